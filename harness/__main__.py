"""`python -m harness <command>`, the same as `harness <command>`."""

import sys


def main() -> int:
    """Run the command line. An interruption while it is imported gives no traceback, either."""
    try:
        from harness.cli import main as run
    except KeyboardInterrupt:
        return 130
    return run()


if __name__ == "__main__":
    sys.exit(main())

"""`python -m harness <command>`, the same as `harness <command>`."""

import sys

from harness.cli import main

sys.exit(main())

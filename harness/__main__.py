"""`python -m harness <stage>`: every rule of the workflow, and a few tools, by hand."""

import sys

from harness.cli import main

sys.exit(main())

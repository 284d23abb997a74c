"""`python -m geko_kernels`."""

import sys

from geko_kernels.cli import main

sys.exit(main())

"""``python -m jkd`` is ``jkd``."""

import sys

from jkd.cli import main

sys.exit(main())

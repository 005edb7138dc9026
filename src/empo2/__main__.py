"""`python -m empo2` is `empo2`."""

import sys

from empo2.cli import main

sys.exit(main())

"""`python -m penstock.engine FD`: see engine.process."""

import sys

from penstock.engine.process import main

sys.exit(main())

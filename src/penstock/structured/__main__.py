"""`python -m penstock.structured FD`: see worker."""

import sys

from penstock.structured.worker import main

sys.exit(main())

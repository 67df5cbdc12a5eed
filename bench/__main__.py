"""Training steps against their peers: python -m rvi_fast.bench --help."""

import sys

from .main import main

sys.exit(main())

"""`python -m memopt_cli`, which is what torchrun starts."""

import sys

from .main import main

sys.exit(main())

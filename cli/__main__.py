"""`python -m memopt_cli`, as torchrun starts it."""

import os
import sys

from .main import main
from .train.group import launched

if __name__ == "__main__":
    status = main()
    if launched():
        # Threads of a process group outlive it, and an interpreter that ends above them aborts now and then.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)

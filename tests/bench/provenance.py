"""What a figure must name to be worth anything.

The environment variable COMMIT says which commit is measured where git does not know.
"""

import datetime
import os
import subprocess
from pathlib import Path

import torch


def provenance() -> dict[str, str]:
    """GPU, torch, commit and date."""
    return {"gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none: CPU", **software()}


def software() -> dict[str, str]:
    """Torch, commit and date."""
    return {
        "torch": torch.__version__,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def commit() -> str:
    """The commit that is checked out, in short."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return os.environ.get("COMMIT") or found.stdout.strip() or "unknown"

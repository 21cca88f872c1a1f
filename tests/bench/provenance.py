"""What a figure must name to be worth anything.

The environment variable COMMIT says which commit is measured where git does not know.
"""

import datetime
import os
import subprocess

import torch


def provenance() -> dict[str, str]:
    """GPU, torch, commit and date."""
    commit = os.environ.get("COMMIT")
    if not commit:
        found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
        commit = found.stdout.strip() or "unknown"
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none: CPU",
        "torch": torch.__version__,
        "commit": commit,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }

"""What a figure must name to be worth anything.

Where git is absent, the environment variable COMMIT says which commit is measured.
"""

import datetime
import os
import subprocess

import torch


def provenance() -> dict[str, str]:
    """GPU, torch, commit and date."""
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = os.environ.get("COMMIT", "unknown")
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none: CPU",
        "torch": torch.__version__,
        "commit": commit,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }

"""What a figure must name to be worth anything.

The environment variable COMMIT says which commit is measured where git does not know. As a command, for the rows that
`memopt sweep` writes, which speak of the user's project and not of this one:

    memopt sweep densenet_models.bc:DenseNet --depth 40:400:60 --also checkpointed=tests/bench/rivals.py:checkpointed \\
        --out tests/bench/results/depth
    python tests/bench/provenance.py tests/bench/results/depth.csv    # adds the commit and the date to every row
"""

import csv
import datetime
import os
import subprocess
import sys
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


def add_to(path: Path) -> None:
    """Let every row of a CSV file name the commit that is checked out, and today."""
    with path.open(newline="") as file:
        rows = [row | {"commit": commit(), "date": software()["date"]} for row in csv.DictReader(file)]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    add_to(Path(sys.argv[1]))

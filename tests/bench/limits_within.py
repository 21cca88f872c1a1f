"""The largest batch and the deepest DenseNet-BC (k = 12) within a given memory, for each variant.

    PYTHONPATH=. python tests/bench/limits_within.py --out tests/bench/results/limits.csv

What `memopt limits` answers: predicted, and on a GPU trained within that memory. Deep models take minutes.
"""

import argparse
import json
import tempfile
from pathlib import Path

from memopt_cli.main import main as memopt_command
from provenance import provenance
from results_file import append_rows

TARGET = "densenet_models.bc:DenseNet"
CHECKPOINTED = f"checkpointed={Path(__file__).with_name('rivals.py')}:checkpointed"
FIELDS = (
    "target", "input", "memory_bytes", "largest", "variant", "size", "peak_allocated_bytes", "peak_reserved_bytes",
    "trained", "gpu", "torch", "commit", "date",
)  # fmt: skip


def main() -> None:
    """Ask, and append the answers to a CSV file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", default="12GiB")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        answers = Path(folder) / "answers.json"
        command = ["limits", TARGET, "--memory", options.memory, "--also", CHECKPOINTED, "--json", str(answers)]
        if memopt_command(command) != 0:
            raise SystemExit(f"memopt {' '.join(command)} failed")
        document = json.loads(answers.read_text())
    origin = {
        "target": TARGET,
        "input": "x".join(map(str, document["input_shape"])),
        "memory_bytes": document["memory_bytes"],
        **provenance(),
    }
    append_rows(options.out, FIELDS, (origin | answer for answer in document["limits"]), lambda row: row["variant"])


if __name__ == "__main__":
    main()

"""The largest batch and the deepest DenseNet-BC (k = 12) within a given memory, for each variant.

    PYTHONPATH=. python tests/bench/limits_within.py --out tests/bench/results/limits.csv

What `memopt limits` answers: predicted, and on a GPU trained within that memory. Deep models take minutes to predict.
They can be predicted elsewhere, and only trained on the GPU, the small ones first, for so many seconds:

    PYTHONPATH=. python tests/bench/limits_within.py --out tests/bench/results/limits.csv --only-train --seconds 300
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from line import HELP, Line
from memopt_cli.job import make_job
from memopt_cli.limits import trains
from memopt_cli.main import main as memopt_command
from memopt_cli.options import parse
from memopt_cli.variants import NAIVE, levels, other_variants, with_batch
from provenance import provenance
from results_file import append_rows, write_rows
from rows_table import Row, load

TARGET = "densenet_models.bc:DenseNet"
CHECKPOINTED = f"checkpointed={Path(__file__).with_name('rivals.py')}:checkpointed"
OPTIONS = ("--also", CHECKPOINTED)
FIELDS = (
    "target", "input", "memory_bytes", "largest", "variant", "size", "peak_allocated_bytes", "peak_reserved_bytes",
    "largest_peak_allocated_bytes", "trained", "gpu", "torch", "commit", "date",
)  # fmt: skip


def main() -> None:
    """Ask, and append the answers to a CSV file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", default="12GiB")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only-train", action="store_true", help="what was predicted before")
    parser.add_argument("--seconds", type=float, default=300.0, help="no model is trained after them")
    parser.add_argument("--lock", type=Path, help=HELP)
    options = parser.parse_args()
    if options.only_train:
        fill_in(options.out, time.monotonic() + options.seconds, Line(options.lock))
        return
    with tempfile.TemporaryDirectory() as folder:
        answers = Path(folder) / "answers.json"
        command = ["limits", TARGET, "--memory", options.memory, *OPTIONS, "--json", str(answers)]
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


def fill_in(path: Path, deadline: float, line: Line | None = None) -> None:
    """Train what the rows of a file say, while nobody measures, and put into each whether it does."""
    rows = load(path)
    for row in sorted(rows, key=lambda row: (row["largest"] == "depth", int(row["size"]))):
        if time.monotonic() > deadline:
            print("stopped: out of time")
            break
        with (line or Line()).compiling():
            row |= {"trained": str(trained(row)), **provenance()}
        print(row, flush=True)
        write_rows(path, FIELDS, rows)


def trained(row: Row) -> bool:
    """Whether the model and batch of a row train on the GPU while torch may take no more of it than the memory."""
    by_depth = row["largest"] == "depth"
    argument = ("--arg", f"depth={row['size']}") if by_depth else ()
    job = make_job(
        parse(["limits", row["target"], "--memory", row["memory_bytes"], "--input", row["input"], *argument])
    )
    variants = (NAIVE, *other_variants([CHECKPOINTED]), *levels(job.config))
    (variant,) = (each for each in variants if each.label == row["variant"])
    job = job if by_depth else with_batch(job, int(row["size"]))
    return trains(job, variant, int(row["memory_bytes"]), job.device)


if __name__ == "__main__":
    main()

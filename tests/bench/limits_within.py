"""The largest batch and the deepest DenseNet-BC (k = 12) within a given memory, for each variant.

    PYTHONPATH=. python tests/bench/limits_within.py --out tests/bench/results/limits.csv

What `memopt limits` answers: predicted, and on a GPU trained within that memory, a smaller one where that runs out of
it. Deep models take minutes to predict. They can be predicted elsewhere, and only trained on the GPU, the small ones
first, for so many seconds; a row that was made smaller has no peaks then:

    PYTHONPATH=. python tests/bench/limits_within.py --out tests/bench/results/limits.csv --only-train --seconds 300
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from line import HELP, Line
from memopt_cli.job import make_job
from memopt_cli.limits import down_from, trains
from memopt_cli.main import main as memopt_command
from memopt_cli.options import parse
from memopt_cli.variants import NAIVE, levels, other_variants, with_batch
from provenance import provenance
from results_file import append_rows, write_rows
from rows_table import Row, load

TARGET = "densenet_models.bc:DenseNet"
CHECKPOINTED = f"checkpointed={Path(__file__).with_name('rivals.py')}:checkpointed"
PEAKS = ("peak_allocated_bytes", "peak_reserved_bytes", "largest_peak_allocated_bytes")
OPTIONS = ("--also", CHECKPOINTED)
FIELDS = (
    "target", "input", "memory_bytes", "largest", "variant", "size", "predicted_size", "peak_allocated_bytes",
    "peak_reserved_bytes", "largest_peak_allocated_bytes", "trained", "gpu", "torch", "commit", "date",
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
    """Train what the rows of a file say, while nobody measures, and put into each what did."""
    rows = load(path)
    for row in sorted(rows, key=lambda row: (row["largest"] == "depth", int(row["size"]))):
        if time.monotonic() > deadline:
            print("stopped: out of time")
            break
        with (line or Line()).compiling():
            size = next((size for size in sizes(row) if trained(row, size)), None)
        if size != int(row["size"]):
            row |= dict.fromkeys(PEAKS, "")
        row |= {"size": "" if size is None else str(size), "trained": str(size is not None), **provenance()}
        print(row, flush=True)
        write_rows(path, FIELDS, rows)


def sizes(row: Row) -> Iterator[int]:
    """What is predicted for a row, and what is tried where that does not train."""
    found = down_from(int(row["predicted_size"]))
    by_depth = row["largest"] == "depth"
    yield from dict.fromkeys(max(size - (size - 4) % 6, 10) if by_depth else size for size in found)  # depths: 6n + 4


def trained(row: Row, size: int) -> bool:
    """Whether the model and batch of a row train on the GPU while torch may take no more of it than the memory."""
    by_depth = row["largest"] == "depth"
    argument = ("--arg", f"depth={size}") if by_depth else ()
    job = make_job(
        parse(["limits", row["target"], "--memory", row["memory_bytes"], "--input", row["input"], *argument])
    )
    variants = (NAIVE, *other_variants([CHECKPOINTED]), *levels(job.config))
    (variant,) = (each for each in variants if each.label == row["variant"])
    job = job if by_depth else with_batch(job, size)
    return trains(job, variant, int(row["memory_bytes"]), job.device)


if __name__ == "__main__":
    main()

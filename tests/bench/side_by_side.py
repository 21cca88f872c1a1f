"""Tables that take torch.compile's minutes: rivals compile beside one another on one GPU, and measure one at a time.

    PYTHONPATH=. python tests/bench/side_by_side.py steps --out tests/bench/results/train_step.csv
    PYTHONPATH=. python tests/bench/side_by_side.py depths --out tests/bench/results/train_step.csv
    PYTHONPATH=. python tests/bench/side_by_side.py rivals --out tests/bench/results/train_step.csv
    PYTHONPATH=. python tests/bench/side_by_side.py steps rivals --tables bc100-64 --out FILE
    PYTHONPATH=. python tests/bench/side_by_side.py budgets --plans plans.json --out tests/bench/results/budget.csv

"steps", "depths" and "rivals" are all tables of `train_step.py`: those of several variants and those of several depths
without torch.compile, in one process, and what compiles, in a process for each variant (predictions are filled in
afterwards, see there), of all tables or those of `--tables`. "budgets" are those of `budget.py` on fused kernels,
whose plans it can be given. The rows of all are appended to one CSV file, in the order of the jobs; what they print
goes to one log beside it. The run stops by itself after `--seconds` and keeps the rows that there are.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from line import HELP
from train_step import COMPILED, DEPTH_TABLES, TABLES, TRIED_OUT

HERE = Path(__file__).parent
OWN_PROCESS = (*COMPILED, *TRIED_OUT)
Job = tuple[str, ...]
"""A script of this folder and its arguments."""


def steps(tables: Collection[str] = TABLES) -> Iterator[Job]:
    """Tables of several variants, but for those that take a process of their own."""
    yield _in_one_process([name for name in tables if name not in DEPTH_TABLES])


def depths(tables: Collection[str] = TABLES) -> Iterator[Job]:
    """Tables of several depths."""
    yield _in_one_process([name for name in DEPTH_TABLES if name in tables])


def _in_one_process(tables: Sequence[str]) -> Job:
    plain = dict.fromkeys(v for name in tables for v in TABLES[name].variants if v not in OWN_PROCESS)
    return "train_step.py", *tables, "--no-prediction", "--variants", *plain


def rivals(tables: Collection[str] = TABLES) -> Iterator[Job]:
    """What the others leave out."""
    for name in tables:
        for variant in (v for v in TABLES[name].variants if v in OWN_PROCESS):
            yield "train_step.py", name, "--no-prediction", "--variants", variant


def budgets(tables: Collection[str] = TABLES) -> Iterator[Job]:
    """Each model's, on fused kernels."""
    for table in ("bc100-64", "densenet121-64"):
        if table in tables:
            yield "budget.py", "--tables", table, "--numerics", "fast"


JOBS = {"steps": steps, "depths": depths, "rivals": rivals, "budgets": budgets}


def run(jobs: Sequence[Job], out: Path, log: Path, seconds: float, lock: Path | None = None) -> list[int | None]:
    """Run the jobs at once and join their rows; exit statuses, None where one ran out of time.

    Args:
        jobs: each takes `--out`, `--lock` and `--seconds`.
        out: CSV file that the rows are appended to.
        log: what they print.
        seconds: all of them are stopped then.
        lock: the file by which they stand in line; shared with others, or one of their own.
    """
    deadline = time.monotonic() + seconds
    threads = max((os.cpu_count() or 1) // len(jobs), 2)  # each would start as many as there are cores
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "TORCHINDUCTOR_COMPILE_THREADS": str(threads)}
    with tempfile.TemporaryDirectory() as folder, log.open("a") as file:
        lock = lock or Path(folder) / "lock"
        parts = [Path(folder) / f"{number}.csv" for number in range(len(jobs))]
        running = []
        for (script, *arguments), part in zip(jobs, parts, strict=True):
            # In time for the job to stop by itself before it is stopped.
            ends = (
                "--out",
                str(part),
                "--lock",
                str(lock),
                "--seconds",
                f"{0.9 * seconds:.0f}",
            )
            command = [sys.executable, str(HERE / script), *arguments, *ends]
            running.append(subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment))
        try:
            statuses = [_status(process, deadline) for process in running]
        finally:
            for process in running:
                process.kill()
                process.wait()
        _join(parts, out)
    return statuses


def _status(process: subprocess.Popen[bytes], deadline: float) -> int | None:
    try:
        return process.wait(max(deadline - time.monotonic(), 0.1))
    except subprocess.TimeoutExpired:
        return None


def _join(parts: Sequence[Path], out: Path) -> None:
    """Whole lines only: a job that was stopped may have been writing one."""
    for part in parts:
        head, *rows = part.read_text().splitlines(keepends=True) if part.exists() else [""]
        whole = [row for row in rows if row.endswith("\n")]
        if whole:
            new = not out.exists()
            with out.open("a") as file:
                file.writelines([head, *whole] if new else whole)


def main() -> None:
    """Run them and say which did not end well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="+", choices=JOBS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES), help="only these")
    parser.add_argument("--plans", type=Path, help="of budgets, made before")
    parser.add_argument("--lock", type=Path, help=HELP)
    parser.add_argument("--seconds", type=float, default=520.0)
    options = parser.parse_args()
    given = () if options.plans is None else ("--plans", str(options.plans))
    jobs = [(*job, *given) for which in options.which for job in JOBS[which](options.tables)]
    log = options.out.with_suffix(".log")
    statuses = run(jobs, options.out, log, options.seconds, options.lock)
    for job, status in zip(jobs, statuses, strict=True):
        if status != 0:
            print(f"{' '.join(job)}: {'out of time' if status is None else f'exit status {status}'}, see {log}")
    raise SystemExit(any(status != 0 for status in statuses))


if __name__ == "__main__":
    main()

"""The driver of several benchmarks: what it starts, that rows of all arrive once, that it stops in time."""

import time
from pathlib import Path

import pytest

from tests.bench.scripts import load

SCRIPT = """
import argparse, sys, time
parser = argparse.ArgumentParser()
parser.add_argument("name")
parser.add_argument("--wait", type=float, default=0)
parser.add_argument("--fail", action="store_true")
for option in ("--out", "--lock", "--seconds"):
    parser.add_argument(option)
options = parser.parse_args()
with open(options.out, "w") as file:
    file.write("name,seconds\\n" + options.name + "," + options.seconds + "\\n" + "half a ro")
print("this is", options.name)
time.sleep(options.wait)
sys.exit(3 if options.fail else 0)
"""


def test_every_variant_of_every_table_is_measured_once() -> None:
    side_by_side = load("side_by_side")
    seen = []
    for script, *arguments in (*side_by_side.steps(), *side_by_side.depths(), *side_by_side.rivals()):
        assert script == "train_step.py"
        options = arguments.index("--no-prediction")
        tables, variants = arguments[:options], arguments[options + 2 :]
        seen += [(t, v) for t in tables for v in variants if v in side_by_side.TABLES[t].variants]
    assert sorted(seen) == sorted((t, v) for t, work in side_by_side.TABLES.items() for v in work.variants)


def test_tables_can_be_chosen() -> None:
    side_by_side = load("side_by_side")
    only = ["bc100-64"]
    for kind in ("steps", "rivals", "budgets"):
        jobs = list(side_by_side.JOBS[kind](only))
        assert jobs
        assert {word for job in jobs for word in job if word in side_by_side.TABLES} == {*only}


def test_rows_of_all_are_joined_and_a_slow_one_is_stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    side_by_side = load("side_by_side")
    (tmp_path / "job.py").write_text(SCRIPT)
    monkeypatch.setattr(side_by_side, "HERE", tmp_path)
    out, log = tmp_path / "out.csv", tmp_path / "out.log"
    jobs = [("job.py", "slow", "--wait", "60"), ("job.py", "bad", "--fail"), ("job.py", "good")]
    start = time.monotonic()

    statuses = side_by_side.run(jobs, out, log, 5.0)
    side_by_side.run(jobs[2:], out, log, 5.0)

    assert statuses == [None, 3, 0]
    assert time.monotonic() - start < 30
    assert out.read_text().splitlines() == ["name,seconds", *(f"{name},4" for name in ("slow", "bad", "good", "good"))]
    assert sorted(log.read_text().splitlines()) == ["this is bad", "this is good", "this is good", "this is slow"]

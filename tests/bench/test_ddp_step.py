"""The benchmark of several GPUs, tried out on two CPU processes; its table from made-up and committed rows."""

import csv
import gc
import time
from pathlib import Path
from typing import Any

import pytest

from tests.bench.scripts import load
from tests.composition.ranks import Ranks


def tried_out(rank: int, out: str, seconds: float) -> int:
    bench = load("ddp_step")
    gc.freeze()  # each case collects garbage several times: not among everything that torch has imported
    bench.STEPS = bench.WARMUP = bench.LOSS_STEPS = 1
    everything = bench.cases(["tiny"], 2, with_sync=False)
    chosen = [case for case in everything if case.variant in ("naive", "memopt exact layer")]
    todo = [case for case in chosen if case not in bench.measured_already(Path(out))]
    rows = bench.Bench(bench.torch.device("cpu")).run(todo, time.monotonic() + seconds)
    if rank == 0:
        bench.write(rows, Path(out), bench.provenance())
    else:
        list(rows)
    return len(todo)


def test_rows_of_two_processes(ranks: Ranks, tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"

    assert ranks.run(tried_out, str(out), 60.0) == [8, 8]

    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    by_variant = [[row for row in rows if row["variant"] == variant] for variant in ("naive", "memopt exact layer")]
    for alike in by_variant:
        kinds = [(row["parallel"], row["ranks"], row["batch"]) for row in alike]
        assert kinds == [("ddp", "1", "4"), ("ddp", "2", "4"), ("ddp", "2", "2"), ("fsdp2", "2", "4")]
    for naive, ours in zip(*by_variant, strict=True):
        assert naive["final_loss"] == ours["final_loss"]
        assert int(ours["activation_peak_bytes"]) < int(naive["activation_peak_bytes"])
        assert float(ours["step_seconds"]) >= float(ours["quickest_step_seconds"]) > 0
        assert all(ours[field] for field in ("gpu", "torch", "commit", "date"))
    assert ranks.run(tried_out, str(out), 60.0) == [0, 0]  # nothing is measured twice


def test_it_stops_in_time_and_keeps_its_rows(ranks: Ranks, tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"
    out.write_text("")

    ranks.run(tried_out, str(out), -1.0)

    assert len(out.read_text().splitlines()) == 1  # the header


def test_cases() -> None:
    bench = load("ddp_step")

    found = bench.cases(["bc100", "densenet121", "densenet264"], 2, with_sync=True)

    assert len(found) == len(set(found)) == 2 * (3 * 4 + 3) + 4
    assert {(c.ranks, c.batch) for c in found if c.work == "bc100" and c.norm == "batch"} == {(1, 64), (2, 64), (2, 32)}
    assert {c.parallel for c in found if c.work == "densenet264"} == {"fsdp2"}
    assert not [c for c in found if c.norm == "sync" and "fast" in c.variant]
    assert {c.ranks for c in bench.cases(["bc100"], 1, with_sync=True)} == {1}


def row(variant: str, ranks: int, batch: int, peak: int, seconds: float, loss: float = 2.0, **more: str) -> Any:
    return {
        "work": "bc100", "parallel": "ddp", "norm": "batch", "variant": variant, "ranks": str(ranks),
        "batch": str(batch), "activation_peak_bytes": str(peak * 2**20), "peak_reserved_bytes": str(2 * peak * 2**20),
        "step_seconds": str(seconds), "final_loss": str(loss), "gpu": "A card", "torch": "2", "commit": "abc",
        "date": "today",
    } | more  # fmt: skip


ROWS = [
    row("naive", 1, 64, 1000, 0.040),
    row("memopt exact layer", 1, 64, 140, 0.050),
    row("memopt fast layer", 1, 64, 80, 0.020, loss=2.001),
    row("naive", 2, 64, 1000, 0.044),
    row("memopt exact layer", 2, 64, 141, 0.055),
    row("memopt fast layer", 2, 64, 81, 0.025, loss=2.001),
    row("naive", 2, 32, 500, 0.022, loss=2.1),
]


def test_the_table_compares_with_naive_and_with_one_gpu() -> None:
    text = load("ddp_table").render(ROWS)

    assert "| 2 × 64 | memopt fast layer | 81 MiB | 0.081 | 162 MiB | 25.0 ms | 0.80 | 2.00100 |" in text
    assert "| 2 × 32 | naive | 500 MiB | 1.000 | 1,000 MiB | 22.0 ms | 0.91 | 2.10000 |" in text
    assert "| 1 × 64 | naive | 1,000 MiB | 1.000 | 2,000 MiB | 40.0 ms | — | 2.00000 |" in text
    assert "\n\n*Efficiency*: images per second and GPU, × those of the same variant on one GPU, " in text
    assert load("ddp_table").render([]) == ""


def test_efficiency_is_of_the_quickest_runs() -> None:
    quickest = [
        r | {"quickest_step_seconds": s} for r, s in zip(ROWS, ("0.03", "", "", "0.04", *[""] * 3), strict=True)
    ]

    assert load("ddp_table").efficiency(quickest[3], quickest) == pytest.approx(0.75)


def test_promises() -> None:
    table = load("ddp_table")

    assert table.broken_promises(ROWS) == []
    for change, words in (
        ({"activation_peak_bytes": str(200 * 2**20)}, "activation peak 0.200 × naive, on one GPU 0.140 ×"),
        ({"final_loss": "2.0000001"}, "is not naive's"),
    ):
        (sentence,) = table.broken_promises([*ROWS[:4], ROWS[4] | change, *ROWS[5:]])
        assert words in sentence
    (sentence,) = table.broken_promises([*ROWS[:5], ROWS[5] | {"activation_peak_bytes": str(130 * 2**20)}])
    assert "activation peak 0.130 × naive" in sentence


def test_the_committed_rows_keep_the_promises_and_are_in_the_readme() -> None:
    table = load("ddp_table")
    now, before = (table.load(folder / "ddp_step.csv") for folder in (table.RESULTS, table.RESULTS / "earlier"))
    text = (table.ROOT / "README.md").read_text()

    assert now or before
    assert table.broken_promises(now) == table.broken_promises(before) == []
    assert table.MARK.search(text)
    assert table.written(text, table.render(now)) == text

"""The README claims what the committed rows say, and each row says where it comes from."""

from itertools import pairwise
from types import ModuleType

import pytest

from tests.bench.scripts import load


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    return load("readme_table")


def test_readme_shows_the_committed_rows(tables: ModuleType) -> None:
    text = (tables.ROOT / "README.md").read_text()

    assert tables.written(text, tables.everything()) == text


def test_rows_of_earlier_commits_stand_beside_their_files(tables: ModuleType) -> None:
    assert tables.EARLIER.read_text() == tables.earlier()


def test_a_figure_that_was_not_measured_is_a_dash(tables: ModuleType) -> None:
    rows = [row for row in tables.load(tables.RESULTS) if row["table"] == "bc100-64"]
    text = tables.render([row | {"step_seconds": ""} for row in rows])

    assert "| memopt exact layer | 301 MiB | 0.139 |" in text
    assert all(line.endswith("| — |") for line in text.splitlines() if line.startswith("| memopt"))


def test_every_row_names_its_origin(tables: ModuleType) -> None:
    rows = tables.load(tables.RESULTS)

    assert rows
    for row in rows:
        assert all(row[field] for field in ("gpu", "torch", "commit", "date")), row


LIMITS = {
    ("bc100-512", "memopt exact concat"): (0.37, 1.14),
    ("bc100-512", "memopt exact layer"): (0.15, 1.22),
    ("densenet121-64", "memopt exact concat"): (0.45, 1.14),
    ("bc100-512", "memopt fast layer"): (0.10, 0.5),
    ("bc100-64", "memopt fast layer"): (0.10, 0.5),
    ("densenet121-64", "memopt fast layer"): (0.19, 0.65),
    ("densenet121-64-bf16", "memopt fast layer"): (0.22, 0.65),
}
"""Activation peak and GPU time, × naive."""


@pytest.mark.parametrize(("table", "variant"), LIMITS)
def test_rows_keep_the_promised_ratios(table: str, variant: str, tables: ModuleType) -> None:
    rows = {(row["table"], row["variant"]): row for row in tables.load(tables.RESULTS)}
    naive, ours = rows[table, "naive"], rows[table, variant]
    fields = ("activation_peak_bytes", "gpu_seconds")

    assert all(
        float(ours[field]) <= limit * float(naive[field])
        for field, limit in zip(fields, LIMITS[table, variant], strict=True)
    ), ours


def test_the_picture_shows_the_committed_rows(tables: ModuleType) -> None:
    pareto = load("pareto")
    text, rows = pareto.PICTURE.read_text(), tables.load(tables.RESULTS)

    for table, title in pareto.TITLES.items():
        assert title in text
        for variant, memory, time in pareto.points(rows, table):
            assert variant.removeprefix("memopt ") in text
            assert memory > 0
            assert time > 0


def figure(tables: ModuleType, table: str, variant: str, field: str) -> float:
    (row,) = (row for row in tables.load(tables.RESULTS) if (row["table"], row["variant"]) == (table, variant))
    return float(row[field])


@pytest.mark.parametrize("table", ["bc100-64", "bc100-512", "densenet121-64", "densenet121-64-bf16"])
def test_fused_kernels_are_faster_than_a_compiled_model_and_waste_little(tables: ModuleType, table: str) -> None:
    ours, rival = (figure(tables, table, name, "gpu_seconds") for name in ("memopt fast layer", "torch.compile"))
    assert ours < rival
    reserved, allocated = (
        figure(tables, table, "memopt fast layer", name) for name in ("peak_reserved_bytes", "peak_allocated_bytes")
    )
    assert reserved <= 1.15 * allocated


def test_a_plain_loop_and_a_graph_are_faster_too(tables: ModuleType) -> None:
    def seconds(variant: str) -> float:
        return figure(tables, "bc100-64", variant, "step_seconds")

    assert seconds("memopt fast layer") <= 0.6 * seconds("naive")
    assert seconds("memopt fast layer, CUDA graph") <= seconds("torch.compile reduce-overhead")
    benchmarked = figure(tables, "bc100-512", "naive channels-last, cudnn.benchmark", "gpu_seconds")
    assert figure(tables, "bc100-512", "memopt fast layer", "gpu_seconds") <= 0.75 * benchmarked


def test_two_thousand_layers_train_within_twelve_gibibytes(tables: ModuleType) -> None:
    (row,) = (row for row in tables.load(tables.DEEPEST) if int(row["depth"]) >= 2000)
    assert row["outcome"] == "trained"
    assert int(row["peak_reserved_bytes"]) <= int(row["cap_bytes"]) == 12 * 2**30
    assert row["notes"].startswith("Verified beside the untouched model")


def test_no_measured_peak_exceeds_its_budget_and_more_memory_costs_no_time(tables: ModuleType) -> None:
    rows = [row for row in tables.load(tables.RESULTS.with_name("budget.csv")) if row["budget_bytes"]]
    assert len(rows) >= 16
    for row in rows:
        assert int(row["peak_allocated_bytes"]) <= int(row["budget_bytes"])
    falling = sorted(rows, key=lambda row: -int(row["budget_bytes"]))
    planned = [float(row["planned_seconds"]) for row in falling]
    assert planned == sorted(planned)
    measured = [float(row["gpu_seconds"]) for row in falling]
    assert all(later >= 0.99 * earlier for earlier, later in pairwise(measured))


def test_predictions_are_as_good_as_the_readme_says(tables: ModuleType) -> None:
    rows = tables.load(tables.RESULTS.with_name("predicted.csv"))

    def good(row: dict[str, str]) -> bool:
        figures = ("activation_peak_bytes", "peak_allocated_bytes")
        return all(abs(float(row[f"predicted_{n}"]) / float(row[f"measured_{n}"]) - 1) < 0.03 for n in figures)

    assert sum(good(row) for row in rows) >= 34
    assert all(good(row) for row in rows if row["held_out"] == "False")
    assert sum(good(row) for row in rows if row["held_out"] == "True") >= 18

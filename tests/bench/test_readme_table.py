"""The README claims what the committed rows say, and each row says where it comes from."""

from types import ModuleType

import pytest

from tests.bench.scripts import load

newest = load("rows_table").newest


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    return load("readme_table")


def test_readme_shows_the_committed_rows(tables: ModuleType) -> None:
    text = (tables.ROOT / "README.md").read_text()

    assert tables.written(text, tables.everything()) == text


def test_rows_of_earlier_commits_stand_beside_their_files(tables: ModuleType) -> None:
    assert tables.EARLIER.read_text() == tables.earlier()


def test_a_figure_that_was_not_measured_is_a_dash(tables: ModuleType) -> None:
    rows = newest("train_step.csv", "bc100-64", "memopt exact layer")
    text = tables.render([row | {"step_seconds": ""} for row in rows])

    assert "| memopt exact layer | 301 MiB | 0.139 |" in text
    assert all(line.endswith("| — |") for line in text.splitlines() if line.startswith("| memopt"))


def test_limits_say_what_was_trained(tables: ModuleType) -> None:
    rows = tables.load(tables.RESULTS / "limits.csv")
    outcomes = ["True", "False", *[""] * (len(rows) - 2)]
    text = tables.render_limits([row | {"trained": how} for row, how in zip(rows, outcomes, strict=True)])
    assert f"| {rows[0]['variant']} | {int(rows[0]['size']):,}, trained |" in text
    assert f"| {rows[1]['variant']} | {int(rows[1]['size']):,}, out of memory |" in text
    assert text.count("trained") == 1


def test_every_row_names_its_origin(tables: ModuleType) -> None:
    files = [
        folder / f"{name}.csv" for folder in (tables.RESULTS, tables.RESULTS / "earlier") for name in tables.RENDERED
    ]
    rows = [row for file in (*files, tables.RESULTS / "depth.csv") for row in tables.load(file)]

    assert len(rows) > 100
    for row in rows:
        assert row.get("gpu") or row["device"], row
        assert all(row[field] for field in ("torch", "commit", "date")), row


def test_the_pictures_show_the_committed_rows(tables: ModuleType) -> None:
    pareto = load("pareto")
    text = (tables.RESULTS / "pareto.svg").read_text()

    for table, title in pareto.TITLES.items():
        assert title in text
        for variant, memory, time in pareto.points(pareto.measured(table), table):
            assert variant.removeprefix("memopt ") in text
            assert memory > 0
            assert time > 0
    assert "within budgets" in (tables.RESULTS / "budget.svg").read_text()


def figures(table: str, field: str, *variants: str) -> list[float]:
    """Of variants that one run measured."""
    rows = {row["variant"]: row for row in newest("train_step.csv", table, *variants)}
    return [float(rows[variant][field]) for variant in variants]


@pytest.mark.parametrize("table", ["bc100-64", "bc100-512", "densenet121-64", "densenet121-64-bf16"])
def test_fused_kernels_are_faster_than_a_compiled_model_and_waste_little(table: str) -> None:
    ours, rival = figures(table, "gpu_seconds", "memopt fast layer", "torch.compile")
    assert ours < rival
    (reserved,), (allocated,) = (
        figures(table, name, "memopt fast layer") for name in ("peak_reserved_bytes", "peak_allocated_bytes")
    )
    assert reserved <= 1.15 * allocated


def test_two_thousand_layers_train_within_twelve_gibibytes(tables: ModuleType) -> None:
    (row,) = (row for row in tables.load(tables.RESULTS / "deepest.csv") if int(row["depth"]) >= 2000)
    assert row["outcome"] == "trained"
    assert int(row["peak_reserved_bytes"]) <= int(row["cap_bytes"]) == 12 * 2**30
    assert row["notes"].startswith("Verified beside the untouched model")


def test_predictions_are_as_good_as_the_readme_says(tables: ModuleType) -> None:
    rows = tables.load(tables.RESULTS / "predicted.csv")

    def error(row: dict[str, str], figure: str) -> float:
        return abs(float(row[f"predicted_{figure}"]) / float(row[f"measured_{figure}"]) - 1)

    assert sum(row["held_out"] == "True" for row in rows) >= 24
    for row in rows:
        name = row["model"], row["variant"]
        assert row["unmeasured_workspaces"] == "0", name
        for figure in ("activation_peak_bytes", "peak_allocated_bytes", "peak_reserved_bytes"):
            assert error(row, figure) < 0.004, (name, figure)

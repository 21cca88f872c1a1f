"""The README claims what the committed rows say, and each row says where it comes from."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("readme_table", HERE / "readme_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_shows_the_committed_rows(tables: ModuleType) -> None:
    text = (tables.ROOT / "README.md").read_text()

    assert tables.written(text, tables.everything()) == text


def test_a_figure_that_was_not_measured_is_a_dash(tables: ModuleType) -> None:
    rows = [row for row in tables.load() if row["table"] == "bc100-64"]
    text = tables.render([row | {"step_seconds": ""} for row in rows])

    assert "| memopt exact layer | 301 MiB | 0.139 |" in text
    assert all(line.endswith("| — |") for line in text.splitlines() if line.startswith("| memopt"))


def test_every_row_names_its_origin(tables: ModuleType) -> None:
    rows = tables.load()

    assert rows
    for row in rows:
        assert all(row[field] for field in ("gpu", "torch", "commit", "date")), row


LIMITS = {
    ("bc100-512", "memopt exact concat"): (0.37, 1.14),
    ("bc100-512", "memopt exact layer"): (0.15, 1.22),
    ("densenet121-64", "memopt exact concat"): (0.45, 1.14),
    ("bc100-512", "memopt fast layer"): (0.10, 0.5),
    ("densenet121-64", "memopt fast layer"): (0.19, 0.70),
}
"""Activation peak and GPU time, × naive."""


@pytest.mark.parametrize(("table", "variant"), LIMITS)
def test_rows_keep_the_promised_ratios(table: str, variant: str, tables: ModuleType) -> None:
    rows = {(row["table"], row["variant"]): row for row in tables.load()}
    naive, ours = rows[table, "naive"], rows[table, variant]
    fields = ("activation_peak_bytes", "gpu_seconds")

    assert all(
        float(ours[field]) <= limit * float(naive[field])
        for field, limit in zip(fields, LIMITS[table, variant], strict=True)
    ), ours


def test_the_picture_shows_the_committed_rows(tables: ModuleType) -> None:
    spec = importlib.util.spec_from_file_location("pareto", HERE / "pareto.py")
    assert spec is not None
    assert spec.loader is not None
    pareto = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pareto)
    text, rows = pareto.PICTURE.read_text(), tables.load()

    for table, title in pareto.TITLES.items():
        assert title in text
        for variant, memory, time in pareto.points(rows, table):
            assert variant.removeprefix("memopt ") in text
            assert memory > 0
            assert time > 0

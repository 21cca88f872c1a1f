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

    assert tables.written(text, tables.render(tables.load())) == text


def test_only_rows_of_the_present_code_are_shown(tables: ModuleType) -> None:
    rows = tables.load()
    old = next(iter(tables.SUPERSEDED))

    assert tables.render([row | {"commit": old} for row in rows]) == f"{tables.NOTHING}\n"
    shown = tables.render([row | {"commit": "0123abc"} for row in rows])
    assert "| memopt exact layer | 2,360 MiB | 0.138 |" in shown
    assert "commit 0123abc" in shown


def test_every_row_names_its_origin(tables: ModuleType) -> None:
    rows = tables.load()

    assert rows
    for row in rows:
        assert all(row[field] for field in ("gpu", "torch", "commit", "date")), row


def test_exact_rows_keep_the_promised_ratios(tables: ModuleType) -> None:
    rows = tables.load()
    naive = {row["table"]: row for row in rows if row["variant"] == "naive"}
    limits = {"memopt exact concat": 1.14, "memopt exact layer": 1.22}
    judged = [r for r in rows if r["table"] in ("bc100-512", "densenet121-64") and r["variant"] in limits]

    assert len(judged) == 4
    for row in judged:
        ratio = float(row["gpu_seconds"]) / float(naive[row["table"]]["gpu_seconds"])
        assert ratio <= limits[row["variant"]], row

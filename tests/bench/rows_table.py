"""Markdown tables made from the CSV rows that benchmarks wrote."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

Row = dict[str, str]
NOTHING = "—"
RESULTS = Path(__file__).parent / "results"
"""Rows measured since the runtime last changed; those of earlier commits are in the folder `earlier` in it."""


def load(path: Path) -> list[Row]:
    """Every committed row; none where nothing was measured yet."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def load_all(name: str) -> list[Row]:
    """The rows of a file, those of earlier commits behind the others."""
    return [*load(RESULTS / name), *load(RESULTS / "earlier" / name)]


def newest(name: str, table: str, *variants: str) -> list[Row]:
    """The rows of a table of the last run that measured all of these variants; none where no run did."""
    for folder in (RESULTS, RESULTS / "earlier"):
        for rows in reversed(runs(row for row in load(folder / name) if row["table"] == table)):
            if {row["variant"] for row in rows} >= {*variants}:
                return rows
    return []


def rivals(table: str) -> list[Row]:
    """What is measured beside memopt, of the last run that measured a compiled model, where all figures were seen."""
    rows = newest("train_step.csv", table, "memopt fast layer", "torch.compile")
    return [row for row in rows if not row["variant"].startswith("memopt") and row["peak_allocated_bytes"]]


def runs(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows of each run, which its commit stands for, in order."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["commit"], []).append(row)
    return list(found.values())


def markdown(title: str, rows: list[Row], headings: Sequence[str], cells: Iterable[Sequence[str]]) -> str:
    """A table below its title, which closes its own bold face, and the origin of the rows that it is made of."""
    head = (f"**{title} ({_origin(rows)})", "", f"| {' | '.join(headings)} |", "|" + "---|" * len(headings))
    return "\n".join((*head, *(f"| {' | '.join(row)} |" for row in cells)))


def _origin(rows: list[Row]) -> str:
    return "; ".join(sorted({f"{r['gpu']}, torch {r['torch']}, commit {r['commit']}, {r['date']}" for r in rows}))


def mib(size_bytes: str) -> str:
    """A size as "12 MiB"."""
    return f"{float(size_bytes) / 2**20:,.0f} MiB" if size_bytes else NOTHING


def milliseconds(seconds: str) -> str:
    """A time as "1.2 ms"."""
    return f"{float(seconds) * 1e3:.1f} ms" if seconds else NOTHING


def number(value: float | None, digits: int) -> str:
    """A number with so many digits behind the point."""
    return NOTHING if value is None else f"{value:.{digits}f}"

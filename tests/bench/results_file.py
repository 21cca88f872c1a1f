"""The CSV files that benchmarks write their rows to."""

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def write_rows(path: Path, fields: Iterable[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """A file of these rows alone, below the names of the fields."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, tuple(fields), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def append_rows(
    path: Path, fields: Sequence[str], rows: Iterable[dict[str, Any]], line: Callable[[dict[str, Any]], object]
) -> None:
    """Write each row as it comes, and print it: a run that is cut off keeps what it has.

    Args:
        path: a new file begins with the names of the fields.
        fields: in order.
        rows: made one after another, which takes its time.
        line: a row as it is printed.
    """
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        if new:
            writer.writeheader()
        for row in rows:
            writer.writerow(row)
            file.flush()
            print(line(row), flush=True)

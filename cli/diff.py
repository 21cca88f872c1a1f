"""`memopt diff`: JSON reports side by side, to judge a change by."""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from memopt.ir import duration, mebibytes
from memopt.report import FIGURE_NAMES, SCHEMA, print_table

from .errors import CommandError

DONE, ABOVE = 0, 1
NOTHING = "—"
# What a report is of, and how a remark calls it.
_SUBJECT = {
    "target": "target",
    "arguments": "--arg",
    "input_shapes": "input",
    "dtype": "dtype",
    "amp": "autocast dtype",
    "device_name": "device",
}
# What was asked for, in reports that say so.
_OPTIONS = ("numerics", "recompute", "budget")
# Where a report keeps figures, and how a row calls them.
_PLACES = {"measured": (), "predicted": ("predicted",)}


def diff(options: argparse.Namespace) -> int:
    """Run the command: 1 where a figure after memopt is above the first report's by more than was allowed."""
    if len(options.reports) < 2:
        raise CommandError("diff compares reports, and one was given. Name two or more files of optimize --json.")
    if options.fail_above is not None and not options.fail_above > 0:
        raise CommandError(f"--fail-above {options.fail_above:g} is no ratio. Give a number above 0, such as 1.05.")
    documents = [_read(path) for path in options.reports]
    names = _names([Path(path) for path in options.reports])
    rows: list[list[str]] = []
    after: list[tuple[str, list[float | None]]] = []
    for source, place in _PLACES.items():
        for when in ("before", "after"):
            figures = {
                name: [_figure(document, (*place, when), name) for document in documents] for name in FIGURE_NAMES
            }
            known = {name: values for name, values in figures.items() if any(value is not None for value in values)}
            if known:
                rows += [[f"{source} {when}"], *(_row(name, values) for name, values in known.items())]
            if when == "after":
                after += [(f"{source} {FIGURE_NAMES[name]}", values) for name, values in known.items()]
    rows += [[""], *_states(documents)]
    failed = () if options.fail_above is None else tuple(_failures(documents, names, after, options.fail_above))
    heads = ("figure", *names, *(["ratio"] if len(names) == 2 else []))
    remarks = _differences(documents)
    if any(NOTHING in cell for row in rows for cell in row):
        remarks.append(
            f"{NOTHING}: a report has no such figure. Steps are measured by optimize --report alone, and what is "
            "reserved on a GPU alone; to a figure that is missing there is no ratio."
        )
    print_table("Reports side by side; ratios to the first", heads, rows, failed, sys.stdout, remarks, words=1)
    return ABOVE if failed else DONE


def _names(paths: list[Path]) -> list[str]:
    """Of reports: as short as tells them apart."""
    for length in range(1, max(len(path.parts) for path in paths)):
        names = [str(Path(*path.parts[-length:])) for path in paths]
        if len({*names}) == len(names):
            return names
    return [str(path) for path in paths]


def _differences(documents: list[dict[str, Any]]) -> list[str]:
    """What the reports are of, where that is not the same."""
    remarks = []
    for key, name in _SUBJECT.items():
        values = [_subject(document.get(key)) for document in documents]
        if len(set(values)) > 1:
            remarks.append(f"The {name} is not the same: {', '.join(values)}.")
    asked = [document.get("options") or {} for document in documents]
    for option in _OPTIONS:
        values = [_subject(each[option]) for each in asked if option in each]
        if len(values) == len(documents) and len(set(values)) > 1:
            remarks.append(f"The option --{option} is not the same: {', '.join(values)}.")
    return remarks


def _subject(value: Any) -> str:
    if isinstance(value, list):  # of shapes, or of arguments
        return " and ".join(one if isinstance(one, str) else "x".join(map(str, one)) for one in value) or "none"
    return "none" if value is None else str(value)


def _read(path: str) -> dict[str, Any]:
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise CommandError(f"{path} cannot be read: {error.strerror}. Name a file of optimize --json.") from error
    except ValueError as error:  # no JSON, or no text at all
        raise CommandError(f"{path} is no JSON document. Name a file of optimize --json.") from error
    if not isinstance(document, dict) or not isinstance(document.get("after"), dict):
        raise CommandError(f"{path} is no report of memopt. Name a file of optimize --json.")
    if document.get("schema", SCHEMA) != SCHEMA:
        raise CommandError(
            f"{path} has schema {document['schema']}, not {SCHEMA}. Make it anew with this memopt's optimize --json."
        )
    return document


def _found(document: dict[str, Any], *keys: str) -> Any:
    """What stands there; None where nothing does."""
    found: Any = document
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def _figure(document: dict[str, Any], place: tuple[str, ...], figure: str) -> float | None:
    found = _found(document, *place, figure)
    return found if isinstance(found, int | float) else None


def _ratio(first: float | None, other: float | None) -> float | None:
    if first is None or other is None:
        return None
    if first == 0:
        return 1.0 if other == 0 else float("inf")
    return other / first


def _row(figure: str, values: list[float | None]) -> list[str]:
    """Of two reports with the ratio beside them; of more with ratios below, where a terminal has room for them."""

    def text(value: float | None) -> str:
        if value is None:
            return NOTHING
        return duration(value) if figure == "step_seconds" else mebibytes(value)

    ratios = [_ratio(values[0], value) for value in values[1:]]
    shown = [NOTHING if ratio is None else f"{ratio:.3f} ×" for ratio in ratios]
    name, first, *others = f"  {FIGURE_NAMES[figure]}", *map(text, values)
    return [name, first, *(others + shown if len(others) == 1 else map("{}\n{}".format, others, shown))]


def _states(documents: list[dict[str, Any]]) -> list[list[str]]:
    """What is no figure, but may have changed."""
    chains = [f"{_found(d, 'chains', 'rewritten')} of {_found(d, 'chains', 'found')}" for d in documents]
    equal = ["yes" if _found(d, "equivalence", "passed") else "no" for d in documents]
    return [["chains rewritten", *chains], ["equivalent", *equal]]


def _failures(
    documents: list[dict[str, Any]],
    names: list[str],
    after: list[tuple[str, list[float | None]]],
    fail_above: float,
) -> Iterator[str]:
    """Where a report is worse than the first, or lacks what the first has: then nothing says that it is not worse."""
    for number, (document, name) in enumerate(zip(documents[1:], names[1:], strict=True), 1):
        for figure, values in after:
            ratio = _ratio(values[0], values[number])
            if ratio is not None and ratio > fail_above:
                yield f"Above {fail_above:g}: {name}: {figure} is {ratio:.3f} × the first report's."
            elif values[0] is not None and values[number] is None:
                yield f"{name} has no {figure}, which the first report has."
        rewritten, before = (_found(d, "chains", "rewritten") or 0 for d in (document, documents[0]))
        if rewritten < before:
            yield f"{name}: fewer chains are rewritten."
        if not _found(document, "equivalence", "passed"):
            yield f"{name} says that the model is not equivalent."
        if any(_found(document, *place, "after", "out_of_memory") for place in _PLACES.values()):
            yield f"{name}: the step ran out of memory."

"""The report on a terminal."""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TextIO

from rich import box
from rich.console import Console, JustifyMethod, RenderableType
from rich.table import Table
from rich.text import Text

from memopt.ir import Explanation, MemoryPlan, first_names
from memopt.measure import Comparison, Equivalence
from memopt.report.plan import PLAN_HEADINGS, PLAN_WORDS, plan_legend, plan_rows
from memopt.report.rows import (
    NOTHING,
    NOTHING_REWRITTEN,
    FigureRow,
    block_rows,
    category_rows,
    equivalence_line,
    figure_rows,
    not_paying,
    rejection_rows,
    shape_text,
    share_text,
    subject_line,
)
from memopt.report.tree import SAVED_LEGEND, explanation_tree


def print_comparison(
    comparison: Comparison, title: str = "", file: TextIO | None = None, width: int | None = None
) -> None:
    """Print the whole report: chains, rejections, equivalence, measured and predicted figures.

    When the equivalence failed no figure is printed: nothing is claimed for a model that computes something
    else. Nor is it where nothing was rewritten, which is said first.

    Args:
        comparison: from `memopt.compare`.
        title: what was compared; "" leaves the line out.
        file: where to, None for stdout; styled only if it is a terminal.
        width: columns; None for the terminal's, 80 where there is none.
    """
    explanation, equal = comparison.explanation, comparison.equivalence.passed
    with _printing(file, width) as console:
        console.print(_heading(comparison, title))
        _print_chains(console, explanation)
        if explanation.rewritten or not equal:
            _print_equivalence(console, comparison)
        if explanation.rewritten and equal:
            _print_figures(console, comparison)
        if comparison.plan is not None and comparison.plan.layers:
            console.print(_plan_table(comparison.plan), "", Text(plan_legend(comparison.plan)), "", sep="\n")
        _print_notes(console, (*explanation.notes, *comparison.notes))


def print_explanation(explanation: Explanation, title: str, file: TextIO, width: int | None = None) -> None:
    """Print the chains as a tree: where each was written, what is done with it and what that saves, or why nothing is.

    Args:
        explanation: from `memopt.explain`.
        title: what was explained.
        file: where to; styled only if it is a terminal.
        width: columns; None for the terminal's, 80 where there is none.
    """
    with _printing(file, width) as console:
        console.print(Text(title, style="bold"))
        if not explanation.rewritten:
            console.print(f"\n{NOTHING_REWRITTEN}", style="yellow")
        console.print("", explanation_tree(explanation), "", sep="\n")
        if any(chain.saved_bytes for chain in explanation.chains):
            console.print(Text(SAVED_LEGEND), "", sep="\n")
        _print_notes(console, explanation.notes)


def print_table(
    title: str,
    headings: Sequence[str],
    rows: Iterable[Sequence[str]],
    notes: Iterable[str],
    file: TextIO,
    remarks: Iterable[str] = (),
    words: int = 2,
) -> None:
    """Print rows of text under a title and remarks, the first columns, of words, to the left, and sentences below."""
    table = _table()
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="left" if place < words else "right")
    for row in rows:
        table.add_row(*map(Text, row))
    with _printing(file, None) as console:
        console.print(Text(title, style="bold"))
        for remark in remarks:
            console.print(Text(remark))
        console.print("", table, "", sep="\n")
        for note in notes:
            console.print(Text(note))


def print_as_found(
    title: str, columns: Mapping[str, int], rows: Iterable[Sequence[str]], notes: Iterable[str], file: TextIO
) -> None:
    """Print a table whose rows take long to find, each row as soon as it is there.

    Args:
        title: above it.
        columns: headings, the first two to the left, and the longest text below each as far as it is known.
        rows: of text, found one by one.
        notes: sentences below it.
        file: where to; styled only if it is a terminal.
    """

    def put(*parts: RenderableType) -> None:
        with _printing(file, None) as console:
            console.print(*parts, sep="\n")
        file.flush()

    def table(row: Sequence[str] | None) -> Table:
        part = _table()
        part.show_header = row is None
        for place, (heading, width) in enumerate(columns.items()):
            justify: JustifyMethod = "left" if place < 2 else "right"
            # What is longer than was known goes on below: nothing of it is cut off.
            part.add_column(heading, justify=justify, width=max(width, len(heading)), overflow="fold")
        if row is not None:
            part.add_row(*map(Text, row))
        return part

    put(Text(title, style="bold"), "", table(None))
    for row in rows:
        put(table(row))
    put("", *map(Text, notes))


@contextmanager
def _printing(file: TextIO | None, width: int | None) -> Iterator[Console]:
    """A console on `file`; where that is no terminal, without the spaces that fill the cells of tables."""
    file = sys.stdout if file is None else file
    console = _console(file, width)
    with console.capture() as captured:
        yield console
    text = captured.get()
    # Written by us: rich would go round what holds a progress line below the text.
    file.write(text if console.is_terminal else "".join(f"{line.rstrip()}\n" for line in text.splitlines()))


def _console(file: TextIO, width: int | None) -> Console:
    return Console(file=file, width=width, highlight=False)


def _heading(comparison: Comparison, title: str) -> Text:
    return Text.assemble((f"{title}\n" if title else "", "bold"), subject_line(comparison))


def _print_chains(console: Console, explanation: Explanation) -> None:
    found, rewritten = len(explanation.chains), len(explanation.rewritten)
    if not rewritten:
        console.print(f"\n{NOTHING_REWRITTEN}", style="yellow")
    console.print(f"\n{found} chains found, {rewritten} rewritten, {found - rewritten} left alone\n")
    if found:
        console.print(_blocks_table(explanation), "")
    if explanation.rejected:
        console.print(_rejections_table(explanation), "")


def _blocks_table(explanation: Explanation) -> Table:
    table = _table()
    table.add_column("dense block")
    table.add_column("layers rewritten", justify="right")
    table.add_column("exits rewritten", justify="right")
    table.add_column("recompute")
    for row in block_rows(explanation.chains):
        table.add_row(
            str(row.block) if row.block else "none",
            share_text(row.layers_rewritten, row.layers),
            share_text(row.exits_rewritten, row.exits),
            ", ".join(row.levels),
        )
    return table


def _rejections_table(explanation: Explanation) -> Table:
    table = _table()
    table.add_column("left alone", justify="right")
    table.add_column("because", ratio=1)
    table.add_column("where", ratio=1)
    for row in rejection_rows(explanation.chains):
        table.add_row(str(row.count), Text(row.reason), Text(row.places))
    return table


def _print_equivalence(console: Console, comparison: Comparison) -> None:
    equivalence = comparison.equivalence
    style = "green" if equivalence.passed else "bold red"
    shapes = ", ".join(shape_text(shape) for shape in comparison.checked_shapes)
    console.print(Text.assemble((equivalence_line(equivalence), style), f" Checked on {shapes}."))
    if not equivalence.passed:
        console.print(Text("Nothing is claimed for this model. Please report it.", style="bold red"))
    if equivalence.skipped:
        _print_skipped(console, equivalence)
    console.print()


def _print_skipped(console: Console, equivalence: Equivalence) -> None:
    named = first_names(equivalence.skipped)
    console.print(Text(f"Not compared, since eager itself does not repeat it: {named}.", style="yellow"))


def _print_figures(console: Console, comparison: Comparison) -> None:
    """What was measured and predicted, without columns that nothing would stand in; nothing where neither was."""
    sections = {
        f"measured on {comparison.device_name}": figure_rows(
            comparison.before, comparison.after, rough_time=comparison.device == "cpu"
        ),
        f"predicted for a {comparison.target.name}": figure_rows(
            comparison.predicted_before, comparison.predicted_after
        ),
        "allocated at the moment of that peak": category_rows(comparison.timeline_before, comparison.timeline_after),
    }
    rows = [row for section in sections.values() for row in section]
    headings = {"before": "before", "after": "after", "ratio": "after / before"}
    shown = {name: text for name, text in headings.items() if any(getattr(row, name) != NOTHING for row in rows)}
    if not shown:
        return
    table = _table()
    table.add_column("training step")
    for heading in shown.values():
        table.add_column(heading, justify="right")
    for source, section in sections.items():
        _add_figures(table, source, section, shown)
    console.print(table, "")
    for warning in not_paying(comparison):
        console.print(Text(warning, style="bold yellow"), "", sep="\n")


def _plan_table(plan: MemoryPlan) -> Table:
    table = _table()
    for place, heading in enumerate(PLAN_HEADINGS):
        table.add_column(heading, justify="left" if place < PLAN_WORDS else "right")
    for row in plan_rows(plan):
        table.add_row(*row.cells)
    return table


def _add_figures(table: Table, source: str, rows: tuple[FigureRow, ...], shown: Iterable[str]) -> None:
    if not rows:
        return
    table.add_section()
    table.add_row(Text(source, style="italic"))
    for row in rows:
        cells = (Text(getattr(row, name), style="bold" if name == "ratio" else "") for name in shown)
        table.add_row(f"  {row.figure}", *cells)


def _print_notes(console: Console, notes: tuple[str, ...]) -> None:
    for note in notes:
        console.print(Text(f"Note: {note}"))


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")

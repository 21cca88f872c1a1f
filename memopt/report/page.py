"""A comparison, or its timeline alone, as one HTML page that needs nothing else."""

from collections.abc import Iterable, Sequence
from html import escape

from memopt.ir import MemoryPlan, mebibytes
from memopt.measure import Comparison, Timeline
from memopt.report.pictures import as_svg, timeline_figure
from memopt.report.plan import PLAN_HEADINGS, PLAN_WORDS, plan_legend, plan_rows
from memopt.report.rows import (
    NOTHING,
    NOTHING_REWRITTEN,
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

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; margin: .5rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .9rem .2rem 0; text-align: right; border-bottom: 1px solid #ddd; vertical-align: top; }
th:first-child, td:first-child { text-align: left; }
th, td:not(.text) { white-space: nowrap; }
td.text, th.text { text-align: left; } code { font-size: .85em; }
svg { max-width: 100%; height: auto; } .note { color: #555; }
"""


def comparison_page(comparison: Comparison, title: str) -> str:
    """The whole report.

    Args:
        comparison: to show.
        title: what was compared.

    Raises:
        PictureError: matplotlib is not installed.
    """
    explanation = comparison.explanation
    checked = ", ".join(map(shape_text, comparison.checked_shapes))
    rewritten, found = len(explanation.rewritten), len(explanation.chains)
    parts = [
        f"<p>{escape(subject_line(comparison))}</p>",
        *([] if rewritten else [f"<p><strong>{NOTHING_REWRITTEN}</strong></p>"]),
        f"<p>{found} chains found, {rewritten} rewritten, {found - rewritten} left alone. "
        f"{escape(equivalence_line(comparison.equivalence))} Checked on {escape(checked)}.</p>",
        *_blocks(comparison),
        *_plan(comparison.plan),
        *_figures(f"Training step, measured on {comparison.device_name}", comparison, measured=True),
        *_figures(f"Training step, predicted for a {comparison.target.name}", comparison, measured=False),
        *(f"<p><strong>{escape(warning)}</strong></p>" for warning in not_paying(comparison)),
        *_timelines(comparison.timeline_before, comparison.timeline_after),
        *_rejections(comparison),
        *(f'<p class="note">Note: {escape(note)}</p>' for note in (*explanation.notes, *comparison.notes)),
    ]
    return _page(title, parts)


def timeline_page(before: Timeline | None, after: Timeline | None, title: str) -> str:
    """The timeline alone. Arguments as a `Comparison` has them; raises PictureError without matplotlib."""
    return _page(title, _timelines(before, after))


def named_timelines(before: Timeline | None, after: Timeline | None) -> dict[str, Timeline]:
    """Those that there are, by title."""
    both = (("before", before), ("after", after))
    return {name: line for name, line in both if line is not None}


def _page(title: str, parts: Iterable[str]) -> str:
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    body = "\n".join([f"<h1>{escape(title)}</h1>", *parts])
    return f'<!doctype html>\n<html lang="en">\n<head>{head}</head>\n<body>\n{body}\n</body>\n</html>\n'


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], text_columns: Sequence[int] = ()) -> str:
    def cells(tag: str, values: Sequence[str]) -> str:
        kinds = [' class="text"' if place in text_columns else "" for place in range(len(values))]
        return "".join(f"<{tag}{kind}>{escape(value)}</{tag}>" for kind, value in zip(kinds, values, strict=True))

    head = cells("th", heads)
    body = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table>\n<tr>{head}</tr>\n{body}\n</table>"


def _blocks(comparison: Comparison) -> list[str]:
    rows = [
        (
            str(row.block) if row.block else "in no block",
            share_text(row.layers_rewritten, row.layers),
            share_text(row.exits_rewritten, row.exits),
            ", ".join(row.levels) or NOTHING,
        )
        for row in block_rows(comparison.explanation.chains)
    ]
    return [_table(("dense block", "layers rewritten", "exits rewritten", "recompute"), rows)] if rows else []


def _plan(plan: MemoryPlan | None) -> list[str]:
    """What a memory budget decided, layer by layer."""
    if plan is None or not plan.layers:
        return []
    return [
        "<h2>Memory plan</h2>",
        _table(PLAN_HEADINGS, [row.cells for row in plan_rows(plan)], text_columns=range(1, PLAN_WORDS)),
        f'<p class="note">{escape(plan_legend(plan))}</p>',
    ]


def _figures(heading: str, comparison: Comparison, *, measured: bool) -> list[str]:
    before = comparison.before if measured else comparison.predicted_before
    after = comparison.after if measured else comparison.predicted_after
    rows = figure_rows(before, after, rough_time=measured and comparison.device == "cpu")
    if not rows:
        return []
    cells = [(row.figure, row.before, row.after, row.ratio) for row in rows]
    return [f"<h2>{escape(heading)}</h2>", _table(("", "before", "after", "after / before"), cells)]


def _timelines(before: Timeline | None, after: Timeline | None) -> list[str]:
    lines = named_timelines(before, after)
    if not lines:
        return []
    categories = [(row.figure, row.before, row.after, row.ratio) for row in category_rows(before, after)]
    holdings = [
        (mebibytes(holding.size_bytes), title, holding.category, str(holding.count), holding.origin)
        for title, line in lines.items()
        for holding in line.holdings[:12]
    ]
    return [
        "<h2>Allocated memory over one step</h2>",
        as_svg(timeline_figure(lines)),
        "<h2>At the peak, by category</h2>",
        _table(("category", "before", "after", "after / before"), categories),
        "<h2>At the peak, by origin</h2>",
        _table(("size", "when", "category", "requests", "operator and line"), holdings, text_columns=(1, 2, 4)),
    ]


def _rejections(comparison: Comparison) -> list[str]:
    rows = [(str(row.count), row.reason, row.places) for row in rejection_rows(comparison.explanation.chains)]
    if not rows:
        return []
    return ["<h2>Left alone</h2>", _table(("chains", "reason", "where"), rows, text_columns=(1, 2))]

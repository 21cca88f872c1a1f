"""Pictures: memory over a step, and memory over whatever a sweep varied. The only importer of matplotlib."""

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memopt.ir import MIB, mebibytes
from memopt.measure import CATEGORIES, Timeline

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HOLDINGS_SHOWN = 6
ORIGIN_CHARACTERS = 62
LATE_SHARE = 0.92
"""Of a panel's width: what begins later has its name to the left, where there is room for it."""

# Okabe and Ito's colours, which colour-blind readers tell apart, and one grey.
COLOURS = {
    "parameters": "#56B4E9",
    "optimizer state": "#F0E442",
    "gradients": "#CC79A7",
    "workspaces": "#C8C8C8",
    "arenas": "#009E73",
    "activations": "#0072B2",
    "scratch": "#E69F00",
}
_LINES = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = "osD^vP"


class PictureError(Exception):
    """A picture cannot be drawn; the message says why and what to do."""


def require_matplotlib(what: str) -> None:
    """Find out before the long work whether pictures can be drawn.

    Args:
        what: that asks for one, as the message begins: an option or a command.

    Raises:
        PictureError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise PictureError(
            f"{what} needs matplotlib, which is not installed. Install it with pip install matplotlib, or as memopt's "
            "extra: pip install -e '.[plot]'."
        ) from error


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure, sizes in inches.

    Raises:
        PictureError: matplotlib is not installed.
    """
    require_matplotlib("A picture")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def timeline_figure(lines: Mapping[str, Timeline]) -> "Figure":
    """Allocated memory over one step, stacked by category, a panel for each line, all to one scale.

    Args:
        lines: by title, "before" and "after".

    Raises:
        PictureError: matplotlib is not installed.
    """
    figure = new_figure(5.6 * len(lines), 5.2)
    panels = figure.subplots(1, len(lines), sharey=True, squeeze=False)[0]
    for panel, (title, line) in zip(panels, lines.items(), strict=True):
        _draw_timeline(panel, title, line)
    panels[0].set_ylabel("allocated (MiB)")
    handles, labels = panels[0].get_legend_handles_labels()
    columns = len(labels) if len(lines) > 1 else -(-len(labels) // 2)  # one panel is too narrow for all of them
    figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
    return figure


def _draw_timeline(panel: Any, title: str, line: Timeline) -> None:
    xs = range(len(line.moments))
    columns = [[moment[place] / MIB for moment in line.moments] for place in range(len(CATEGORIES))]
    panel.stackplot(xs, columns, labels=CATEGORIES, colors=[COLOURS[name] for name in CATEGORIES], linewidth=0)
    peak = line.peak_bytes / MIB
    panel.axhline(peak, color="black", linewidth=0.6, linestyle=":")
    panel.plot([line.peak_at], [peak], marker="v", color="black", markersize=6)
    panel.set_title(f"{title}: peak {peak:,.0f} MiB", loc="left", fontsize=10)
    panel.set_xlim(0, len(line.moments) - 1)
    panel.set_ylim(bottom=0)
    panel.set_xticks([at for _, at in line.phases], [name for name, _ in line.phases], fontsize=8)
    for (_, at), label in zip(line.phases, panel.get_xticklabels(), strict=True):
        label.set_horizontalalignment("left" if at < LATE_SHARE * len(line.moments) else "right")
    panel.grid(axis="x", color="black", alpha=0.25, linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)
    alive = "\n".join(
        f"{mebibytes(holding.size_bytes):>13}  {_short(holding.origin)}" for holding in line.holdings[:HOLDINGS_SHOWN]
    )
    below = f"(in the order of requests, not by time)\nalive at the peak, the largest:\n{alive}"
    panel.set_xlabel(below, fontsize=7, family="monospace", loc="left")


def _short(origin: str) -> str:
    """Operator and line without torch's own additions; where they are too long for a panel, without their middle."""
    origin = re.sub(r"\baten\.(\w+)\.default\b", r"\1", origin)
    half = ORIGIN_CHARACTERS // 2
    return origin if len(origin) <= ORIGIN_CHARACTERS else f"{origin[:half]}…{origin[1 - half :]}"


def lines_figure(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    *,
    x_label: str,
    y_label: str,
    limit: tuple[str, float] | None = None,
) -> "Figure":
    """One line for each variant on logarithmic axes.

    Args:
        lines: points by label: a number, and a size in bytes above 0.
        x_label, y_label: what the axes show.
        limit: label of a level to mark, and its size in bytes.

    Raises:
        PictureError: matplotlib is not installed.
    """
    figure = new_figure(6.4, 4.4)
    panel: Any = figure.subplots()
    for (label, points), colour, marker in zip(lines.items(), _LINES, _MARKERS, strict=False):
        panel.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=4, linewidth=1.6, label=label)
    if limit is not None:
        panel.axhline(limit[1], color="black", linewidth=0.8, linestyle=":", label=limit[0])
    panel.set_xscale("log")
    panel.set_yscale("log")
    xs = sorted({x for points in lines.values() for x, _ in points})
    panel.set_xticks(xs, [f"{x:g}" for x in xs], fontsize=8)
    sizes = [y for points in lines.values() for _, y in points] + ([] if limit is None else [limit[1]])
    ticks = size_ticks(min(sizes, default=MIB), max(sizes, default=MIB))
    panel.set_yticks(list(ticks), ticks.values())
    panel.set_ylim(min(ticks) / 1.05, max(ticks) * 1.05)
    panel.minorticks_off()
    panel.set_xlabel(x_label)
    panel.set_ylabel(y_label)
    panel.grid(alpha=0.3, which="both")
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, fontsize=8)
    return figure


def size_ticks(least_bytes: float, most_bytes: float) -> dict[float, str]:
    """Labels at 1, 2, 5, 10, … MiB and GiB by size in bytes, from the last not above the least to the first not below
    the most; two at least."""
    steps = [digit * 10.0**power for power in range(-6, 6) for digit in (1, 2, 5)]
    labels = {size * MIB: f"{size:g} MiB" for size in steps if size < 1000}
    labels |= {size * 1024 * MIB: f"{size:g} GiB" for size in steps if size >= 1}
    first = max((size for size in labels if size <= least_bytes), default=min(labels))
    last = min((size for size in labels if size >= most_bytes and size > first), default=max(labels))
    return {size: label for size, label in labels.items() if first <= size <= last}


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a figure; the suffix says as what: .svg or .png."""
    metadata = {"Date": None} if path.suffix == ".svg" else {}
    figure.savefig(path, dpi=150, metadata=metadata)


def as_svg(figure: "Figure") -> str:
    """A figure as an <svg> element."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]

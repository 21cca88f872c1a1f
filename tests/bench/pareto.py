"""Memory against GPU time of every measured variant and of memory budgets, from the committed CSV rows.

python tests/bench/pareto.py    # writes pareto.svg and budget.svg in tests/bench/results
"""

from itertools import product

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.transforms import Bbox
from rows_table import RESULTS, Row, newest, rivals

SIZE_MIB = 2**20
TITLES = {
    "bc100-512": "DenseNet-BC-100, batch 512, fp32",
    "densenet121-64": "densenet121, batch 64, fp32",
    "densenet121-64-bf16": "densenet121, batch 64, bf16 autocast",
}
BUDGETS = {"bc100-64": "DenseNet-BC-100, batch 64, fp32", "densenet121-64": TITLES["densenet121-64"]}
FAMILIES = (
    ("memopt fast", "#0072b2", "o"),
    ("memopt exact", "#009e73", "s"),
    ("", "#777777", "D"),
)
"""Beginning of a variant's name, colour and marker; the first that fits."""
Point = tuple[str, float, float]


def points(rows: list[Row], table: str) -> list[Point]:
    """Variant, memory × naive and GPU time × naive of every row that has both."""
    mine = [row for row in rows if row["table"] == table and row["activation_peak_bytes"] and row["gpu_seconds"]]
    naive = next(row for row in mine if row["variant"] == "naive")

    def ratio(row: Row, field: str) -> float:
        return float(row[field]) / float(naive[field])

    shown = [row for row in mine if "expandable" not in row["variant"]]  # the same step
    return [(row["variant"], ratio(row, "activation_peak_bytes"), ratio(row, "gpu_seconds")) for row in shown]


def draw(axes: Axes, title: str, found: list[Point]) -> None:
    """One table as a panel. Left and low is better."""
    axes.axhline(1.0, color="#cccccc", linewidth=0.8, zorder=1)
    axes.axvline(1.0, color="#cccccc", linewidth=0.8, zorder=1)
    axes.set(xlim=(0, 1.08), ylim=(0, 1.45), title=title, xlabel="activation peak, × naive")
    labels = []
    for variant, memory, time in found:
        _, colour, marker = next(family for family in FAMILIES if variant.startswith(family[0]))
        axes.plot([memory], [time], marker, color=colour, markersize=7, zorder=3)
        labels.append((variant.removeprefix("memopt "), memory, time, colour))
    name_points(axes, labels)


def draw_budgets(axes: Axes, title: str, budgets: list[Row], others: list[Row]) -> None:
    """One model as a panel: a curve for the budgets of each numerics, a point for each rival."""
    axes.set(title=title, xlabel="peak allocated, MiB")
    axes.set(xlim=(0, 1.05 * max(map(_mib, others))), ylim=(0, 1.1 * max(map(_milliseconds, others))))
    labels = []
    for family, colour, marker in FAMILIES[:2]:
        curve = sorted((_mib(row), _milliseconds(row)) for row in budgets if family.endswith(row["numerics"]))
        if curve:
            axes.plot(*zip(*curve, strict=True), marker + "-", color=colour, markersize=4, linewidth=1.2, zorder=3)
            closer = axes.inset_axes((0.63, 0.08, 0.35, 0.24), title="the same, closer", facecolor="#f7f7f7")
            closer.plot(*zip(*curve, strict=True), marker + "-", color=colour, markersize=4, linewidth=1.2)
            closer.tick_params(labelsize=7.5)
            closer.title.set_fontsize(8)
            labels.append((f"{family}, within budgets", *curve[-1], colour))
    for row in others:
        axes.plot([_mib(row)], [_milliseconds(row)], "D", color="#777777", markersize=6, zorder=2)
        labels.append((row["variant"], _mib(row), _milliseconds(row), "#777777"))
    name_points(axes, labels)


def name_points(axes: Axes, labels: list[tuple[str, float, float, str]]) -> None:
    """Write each name beside its point, where it covers no other name and no point: text, x, y and colour."""
    axes.title.set_fontsize(10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.figure.draw_without_rendering()  # only then is it known where things are
    at = [axes.transData.transform((x, y)) for _, x, y, _ in labels]
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in at]
    for (text, x, y, colour), own in zip(labels, list(taken), strict=True):
        for shift, left in product(sorted(range(-60, 61, 6), key=abs), (False, True)):
            name = axes.annotate(
                text,
                (x, y),
                xytext=(-9 if left else 9, shift),
                textcoords="offset points",
                ha="right" if left else "left",
                va="center",
                color=colour,
                fontsize=8.5,
            )
            box = name.get_window_extent().padded(6, 0)  # whoever shows the picture may have a wider font
            if (
                axes.bbox.x0 < box.x0
                and box.x1 < axes.bbox.x1
                and not box.count_overlaps([b for b in taken if b is not own])
            ):
                taken.append(box)
                break
            name.remove()
        else:
            raise ValueError(f"There is no room for the name {text!r}.")


def _mib(row: Row) -> float:
    return float(row["peak_allocated_bytes"]) / SIZE_MIB


def _milliseconds(row: Row) -> float:
    return float(row["gpu_seconds"]) * 1e3


def origin(found: dict[str, list[Row]]) -> str:
    """On what rows were measured."""
    return "; ".join(sorted({f"{row['gpu']}, torch {row['torch']}" for rows in found.values() for row in rows}))


def measured(table: str) -> list[Row]:
    """The last run that measured memopt beside a compiled model."""
    return newest("train_step.csv", table, "memopt fast layer", "torch.compile")


def main() -> None:
    """Draw the pictures."""
    mpl.use("svg")
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "memopt", "font.family": "sans-serif"})
    found = {table: measured(table) for table in TITLES}
    figure, panels = plt.subplots(1, len(TITLES), figsize=(13, 4.6), sharey=True, layout="constrained")
    for axes, (table, title) in zip(panels, TITLES.items(), strict=True):
        draw(axes, title, points(found[table], table))
    panels[0].set_ylabel("GPU time of a step, × naive")
    what = "One training step: blue memopt fast, green memopt exact, grey the rest"
    figure.suptitle(f"{what}\n({origin(found)})", fontsize=10)
    figure.savefig(RESULTS / "pareto.svg", metadata={"Date": None})

    found = {table: newest("budget.csv", table, "budget") for table in BUDGETS}
    figure, panels = plt.subplots(1, len(found), figsize=(5.5 * len(found), 4.4), layout="constrained")
    for axes, (table, rows) in zip(panels, found.items(), strict=True):
        draw_budgets(axes, BUDGETS[table], rows, rivals(table))
    panels[0].set_ylabel("GPU time of a step, ms")
    figure.suptitle(f"One training step within a memory budget\n({origin(found)})", fontsize=10)
    figure.savefig(RESULTS / "budget.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()

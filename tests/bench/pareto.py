"""Memory against GPU time of every measured variant and of memory budgets, from the committed CSV rows.

python tests/bench/pareto.py    # writes pareto.svg and budget.svg in tests/bench/results
"""

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from rows_table import RESULTS, Row, newest

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
    taken: list[tuple[float, float]] = []
    for variant, memory, time in sorted(found, key=lambda point: (point[1] > 0.6, point[2])):
        _, colour, marker = next(family for family in FAMILIES if variant.startswith(family[0]))
        axes.plot([memory], [time], marker, color=colour, markersize=7, zorder=3)
        right = memory > 0.6
        height = time
        # Labels that would cover one another move up.
        while any(abs(height - other) < 0.05 and right == (side > 0.6) for side, other in taken):
            height += 0.01
        taken.append((memory, height))
        axes.annotate(
            variant.removeprefix("memopt "),
            (memory, height),
            xytext=(-9 if right else 9, 0),
            textcoords="offset points",
            ha="right" if right else "left",
            va="center",
            color=colour,
            fontsize=8.5,
        )
    axes.axhline(1.0, color="#cccccc", linewidth=0.8, zorder=1)
    axes.axvline(1.0, color="#cccccc", linewidth=0.8, zorder=1)
    axes.set(xlim=(0, 1.08), ylim=(0, 1.45), title=title, xlabel="activation peak, × naive")
    axes.title.set_fontsize(10)
    axes.spines[["top", "right"]].set_visible(False)


def draw_budgets(axes: Axes, title: str, rows: list[Row]) -> None:
    """One model as a panel: a curve for the budgets of each numerics, a point for each rival."""
    for family, colour, marker in FAMILIES[:2]:
        mine = [r for r in rows if r["variant"] == "budget" and family.endswith(r["numerics"])]
        curve = sorted((_mib(row), _milliseconds(row)) for row in mine)
        if not curve:
            continue
        axes.plot(*zip(*curve, strict=True), marker + "-", color=colour, markersize=4, linewidth=1.2, zorder=3)
        axes.annotate(
            f"{family}, within budgets",
            curve[len(curve) // 2],
            xytext=(6, 8),
            textcoords="offset points",
            color=colour,
            fontsize=8.5,
        )
    rivals = {row["variant"]: row for row in rows if row["variant"] != "budget"}
    most = max(map(_mib, rivals.values()))
    for number, (variant, row) in enumerate(rivals.items()):
        axes.plot([_mib(row)], [_milliseconds(row)], "D", color="#777777", markersize=6, zorder=2)
        right = _mib(row) > most / 2
        axes.annotate(
            variant,
            (_mib(row), _milliseconds(row)),
            xytext=(-8 if right else 8, 3 - 10 * (number % 2)),
            textcoords="offset points",
            ha="right" if right else "left",
            color="#555555",
            fontsize=8.5,
        )
    axes.set(title=title, xlabel="peak allocated, MiB", xlim=(0, None), ylim=(0, None))
    axes.title.set_fontsize(10)
    axes.spines[["top", "right"]].set_visible(False)


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
    figure.suptitle(f"One training step: blue memopt fast, green memopt exact, grey the rest ({origin(found)})")
    figure.savefig(RESULTS / "pareto.svg", metadata={"Date": None})

    found = {table: newest("budget.csv", table, "budget") for table in BUDGETS}
    shown = [table for table, rows in found.items() if rows]
    figure, panels = plt.subplots(1, len(shown), figsize=(5.5 * len(shown), 4.4), squeeze=False, layout="constrained")
    for axes, table in zip(panels[0], shown, strict=True):
        draw_budgets(axes, BUDGETS[table], found[table])
    panels[0, 0].set_ylabel("GPU time of a step, ms")
    figure.suptitle(f"One training step within a memory budget\n({origin(found)})", fontsize=10)
    figure.savefig(RESULTS / "budget.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()

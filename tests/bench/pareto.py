"""Memory against GPU time of every measured variant, from the committed CSV rows.

python tests/bench/pareto.py    # writes tests/bench/results/pareto.svg
"""

import csv
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

RESULTS = Path(__file__).parent / "results"
PICTURE = RESULTS / "pareto.svg"
TITLES = {
    "bc100-512": "DenseNet-BC-100, batch 512, fp32",
    "densenet121-64": "densenet121, batch 64, fp32",
    "densenet121-64-bf16": "densenet121, batch 64, bf16 autocast",
}
FAMILIES = (
    ("memopt fast", "#0072b2", "o"),
    ("memopt exact", "#009e73", "s"),
    ("", "#777777", "D"),
)
"""Beginning of a variant's name, colour and marker; the first that fits."""
Row = dict[str, str]
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


def main() -> None:
    """Draw the picture."""
    mpl.use("svg")
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "memopt", "font.family": "sans-serif"})
    with (RESULTS / "train_step.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    figure, panels = plt.subplots(1, len(TITLES), figsize=(13, 4.6), sharey=True, layout="constrained")
    for axes, (table, title) in zip(panels, TITLES.items(), strict=True):
        draw(axes, title, points(rows, table))
    panels[0].set_ylabel("GPU time of a step, × naive")
    origins = sorted({f"{row['gpu']}, torch {row['torch']}" for row in rows})
    figure.suptitle(f"One training step: blue memopt fast, green memopt exact, grey the rest ({'; '.join(origins)})")
    figure.savefig(PICTURE, metadata={"Date": None})


if __name__ == "__main__":
    main()

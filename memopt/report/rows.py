"""The report's rows as text, before anything decides how they look. Units are as `memopt.ir.units` writes them."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from memopt.ir import ChainReport, by_block, duration, first_names, mebibytes
from memopt.measure import CATEGORIES, Comparison, Equivalence, StepFigures, Timeline

NOTHING = "—"
NOTHING_REWRITTEN = "Nothing was rewritten: memopt leaves this model as it is."
OUT_OF_MEMORY = "out of memory"
HARDLY_SHARE = 0.001
"""Of the peak: less is hardly there."""

# How each figure is called; the order is that of the report.
FIGURE_NAMES = {
    "activation_peak_bytes": "activation peak",
    "saved_bytes": "saved for backward",
    "retained_bytes": "kept by memopt between steps",
    "peak_allocated_bytes": "peak allocated",
    "peak_reserved_bytes": "peak reserved",
    "step_seconds": "step time",
}


@dataclass(frozen=True, slots=True)
class FigureRow:
    """One figure before and after, as text.

    Attributes:
        figure: what it is.
        before: with its unit, "out of memory", or an em dash where there is none.
        after: the same.
        ratio: after / before, "0.150 ×"; an em dash where one of them is missing or before is zero.
    """

    figure: str
    before: str
    after: str
    ratio: str


@dataclass(frozen=True, slots=True)
class BlockRow:
    """The chains of one dense block.

    Attributes:
        block: its number in the order of execution, from 1; 0 collects the chains of no block.
        layers: chains that end in a feature of the block.
        layers_rewritten: of these, how many recompute.
        exits: chains that leave the block (a transition, the final norm).
        exits_rewritten: of these, how many recompute.
        levels: recompute levels used, sorted.
    """

    block: int
    layers: int
    layers_rewritten: int
    exits: int
    exits_rewritten: int
    levels: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RejectionRow:
    """A reason for which chains were left alone.

    Attributes:
        reason: as it was given.
        count: chains left for it.
        places: the first of them, "node (file.py:line)", and how many more.
    """

    reason: str
    count: int
    places: str


def figure_rows(
    before: StepFigures | None, after: StepFigures | None, *, rough_time: bool = False
) -> tuple[FigureRow, ...]:
    """A row for each figure that either side has; a row "training step" when memory ran out on both.

    Args:
        before, after: the figures.
        rough_time: the time comes from few steps, each much like noise, as on a CPU: two digits of it are shown, and
            of how many steps it is.
    """
    fields = [field for field in FIGURE_NAMES if _has(before, field) or _has(after, field)]
    rows = [_figure_row(field, before, after, rough_time and field == "step_seconds") for field in fields]
    if not rows and any(figures is not None and figures.out_of_memory for figures in (before, after)):
        rows = [FigureRow("training step", _cell(before, "", False), _cell(after, "", False), NOTHING)]
    return tuple(rows)


def category_rows(before: Timeline | None, after: Timeline | None) -> tuple[FigureRow, ...]:
    """What is allocated at the moment of the predicted peak, category by category; those that nobody has are left out.

    No ratio is given to what was hardly there before: it would tell of the moment, not of the category.
    """
    rows = []
    least = 0.0 if before is None else HARDLY_SHARE * before.peak_bytes
    for name in CATEGORIES:
        first, second = (None if line is None else line.at_peak[name] for line in (before, after))
        if first or second:
            ratio = NOTHING
            if first and second is not None and (first >= least or first == second):
                ratio = _ratio(second / first, False)
            was, is_now = (NOTHING if size is None else mebibytes(size) for size in (first, second))
            rows.append(FigureRow(name, was, is_now, ratio))
    return tuple(rows)


def not_paying(comparison: Comparison) -> tuple[str, ...]:
    """A sentence for each source by which the rewritten model's peak is not below the untouched one's.

    None under a memory budget, which memopt may fill on purpose.
    """
    sides = {
        f"Measured on {comparison.device_name}": (comparison.before, comparison.after),
        f"Predicted for a {comparison.target.name}": (comparison.predicted_before, comparison.predicted_after),
    }
    if not comparison.explanation.rewritten or comparison.plan is not None:
        return ()
    return tuple(
        f"{source}, memopt does not pay: the peak allocated is {mebibytes(after)} with it and {mebibytes(before)} "
        "without. Leave the model as it is, or try a larger input."
        for source, figures in sides.items()
        for before, after in [(_value(side, "peak_allocated_bytes") for side in figures)]
        if before is not None and after is not None and (after >= before or mebibytes(after) == mebibytes(before))
    )


def block_rows(chains: Iterable[ChainReport]) -> tuple[BlockRow, ...]:
    """Chains counted by dense block, in the order of execution; those of no block last."""
    return tuple(_block_row(number, block) for number, block in by_block(chains).items())


def rejection_rows(chains: Iterable[ChainReport]) -> tuple[RejectionRow, ...]:
    """Rejected chains by reason, the most frequent reason first."""
    by_reason: dict[str, list[ChainReport]] = {}
    for chain in chains:
        if chain.action == "rejected":
            by_reason.setdefault(chain.reason or "no reason given", []).append(chain)
    frequent_first = sorted(by_reason.items(), key=lambda item: -len(item[1]))
    return tuple(
        RejectionRow(reason, len(group), first_names([_place(chain) for chain in group]))
        for reason, group in frequent_first
    )


def equivalence_line(equivalence: Equivalence) -> str:
    """One sentence on what was compared and what came of it."""
    over = f"over {equivalence.steps} optimiser step" + ("s" if equivalence.steps != 1 else "")
    if equivalence.numerics == "fast":
        if equivalence.passed:
            return "Equivalent within eager's own error: as close to float64 as eager is, over 5 seeds."
        return f"NOT EQUIVALENT: farther from float64 than eager is ({first_names(equivalence.differing)})."
    if equivalence.passed:
        what = "outputs, gradients and buffers" if not equivalence.skipped else "all results that eager repeats"
        return f"Equivalent: {what} are bit-identical {over}."
    kinds = {
        "outputs": equivalence.outputs_equal,
        "gradients": equivalence.gradients_equal,
        "buffers": equivalence.buffers_equal,
    }
    unequal = [kind for kind, equal in kinds.items() if not equal]
    if not unequal:
        skipped = len(equivalence.skipped)
        return f"NOT SHOWN EQUIVALENT: eager itself does not repeat {skipped} results {over}."
    return f"NOT EQUIVALENT: {' and '.join(unequal)} differ {over} ({first_names(equivalence.differing)})."


def subject_line(comparison: Comparison) -> str:
    """What was compared: input, dtypes, device."""
    shapes = ", ".join(map(shape_text, comparison.input_shapes))
    dtype = str(comparison.dtype).removeprefix("torch.")
    amp = "" if comparison.amp is None else f", autocast {str(comparison.amp).removeprefix('torch.')}"
    return f"input {shapes}, {dtype}{amp}, on {comparison.device_name}"


def shape_text(shape: Iterable[int]) -> str:
    """(64, 3, 32, 32) as "64x3x32x32"."""
    return "x".join(str(size) for size in shape)


def share_text(rewritten: int, found: int) -> str:
    """ "3 of 4"; an em dash where there are none."""
    return f"{rewritten} of {found}" if found else NOTHING


def _figure_row(field: str, before: StepFigures | None, after: StepFigures | None, rough: bool) -> FigureRow:
    first, second = _value(before, field), _value(after, field)
    ratio = _ratio(second / first, rough) if first and second is not None else NOTHING
    name = FIGURE_NAMES[field] + (_median_of(before, after) if rough else "")
    return FigureRow(name, _cell(before, field, rough), _cell(after, field, rough), ratio)


def _median_of(*sides: StepFigures | None) -> str:
    counts = dict.fromkeys(str(side.timed_steps) for side in sides if side is not None and side.timed_steps)
    return f", median of {' and '.join(counts)}" if counts else ""


def _value(figures: StepFigures | None, field: str) -> float | None:
    value: float | None = getattr(figures, field, None)
    return value


def _has(figures: StepFigures | None, field: str) -> bool:
    return _value(figures, field) is not None


def _cell(figures: StepFigures | None, field: str, rough: bool) -> str:
    if figures is not None and figures.out_of_memory:
        return OUT_OF_MEMORY
    value = _value(figures, field)
    if value is None:
        return NOTHING
    return _seconds(value, rough) if field.endswith("_seconds") else mebibytes(value)


def _seconds(seconds: float, rough: bool) -> str:
    if not rough:
        return duration(seconds)
    factor, unit = next((f, u) for f, u in ((1, "s"), (1e3, "ms"), (1e6, "µs")) if f * seconds >= 1 or u == "µs")
    return f"{_two_digits(factor * seconds)} {unit}"


def _ratio(ratio: float, rough: bool) -> str:
    if rough:
        return f"{_two_digits(ratio)} ×"
    return f"{ratio:.2f} ×" if ratio >= 1 else f"{ratio:.3f} ×"


def _two_digits(value: float) -> str:
    """As in "13", "9.1", "3.0", "0.72", "120"."""
    rounded = float(f"{value:.1e}")
    return f"{rounded:#.2g}" if 0 < rounded < 10 else f"{rounded:g}"


def _block_row(block: int, chains: list[ChainReport]) -> BlockRow:
    count = Counter((chain.role, chain.action) for chain in chains)
    return BlockRow(
        block=block,
        layers=sum(chain.role == "layer" for chain in chains),
        layers_rewritten=count["layer", "rewritten"],
        exits=sum(chain.role == "exit" for chain in chains),
        exits_rewritten=count["exit", "rewritten"],
        levels=tuple(sorted({chain.level for chain in chains if chain.level is not None})),
    )


def _place(chain: ChainReport) -> str:
    where = from_here(chain.source) if chain.source else chain.module
    return f"{chain.node} ({where})" if where else chain.node


def from_here(source: str) -> str:
    """A file and line as seen from the working directory, where it lies below that: shorter."""
    path = Path(source)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else source

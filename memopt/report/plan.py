"""A memory budget's plan as rows of text: what is kept, and what is computed again."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from memopt.ir import Level, MemoryPlan, PlannedLayer, by_block, duration, mebibytes
from memopt.report.rows import NOTHING

_KEEPS: dict[Level, str] = {
    "layer": "the features alone",
    "concat": "the bottleneck outputs too",
    "keep": "what eager keeps",
}


PLAN_HEADINGS = ("dense block", "chains", "level", "kept", "time spared", "recompute time")
PLAN_WORDS = 3
"""So many of them are above words, the others above figures."""


@dataclass(frozen=True, slots=True)
class PlanRow:
    """Chains of a dense block that a memory budget gives the same level, as text.

    Attributes:
        block: number of their dense block, "none" for none; "" where the row above has the same.
        chains: their numbers in the block, counted from 1, "1–4, 7".
        level: how much they recompute.
        kept: what they keep for that, beside the features; an em dash for nothing, as in the others.
        spared: predicted time that this spares.
        again: predicted time for computing the rest again.
    """

    block: str
    chains: str
    level: Level
    kept: str
    spared: str
    again: str

    @property
    def cells(self) -> tuple[str, ...]:
        """Below `PLAN_HEADINGS`."""
        return self.block, self.chains, self.level, self.kept, self.spared, self.again


def plan_rows(plan: MemoryPlan) -> tuple[PlanRow, ...]:
    """A memory plan, shortened: a row for each level in a block, in the order of the first chain at it."""
    return tuple(row for number, layers in by_block(plan.layers).items() for row in _block_rows(number, layers))


def plan_legend(plan: MemoryPlan) -> str:
    """What the words and figures of the rows mean."""
    used = {layer.level for layer in plan.layers}
    levels = ", ".join(f'"{level}" keeps {keeps}' for level, keeps in _KEEPS.items() if level in used)
    sentences = [
        f"Level {levels}. Kept is counted beside the features; times are of one step, predicted for a {plan.target}."
    ]
    if any(layer.spared_seconds for layer in plan.layers):
        sentences.append('Time spared is against level "layer".')
    if any(layer.level != "keep" and not layer.sparable_seconds for layer in plan.layers):
        sentences.append("Layers that keep less than there is room for would spare no time by keeping more.")
    return " ".join(sentences)


def _block_rows(number: int, layers: list[PlannedLayer]) -> Iterable[PlanRow]:
    numbers: dict[Level, list[int]] = defaultdict(list)
    for place, layer in enumerate(layers, 1):
        numbers[layer.level].append(place)
    name = str(number) if number else "none"
    for level, places in numbers.items():
        alike = [layers[place - 1] for place in places]
        kept_bytes = sum(layer.kept_bytes for layer in alike)
        yield PlanRow(
            block=name,
            chains=_ranges(places),
            level=level,
            kept=mebibytes(kept_bytes) if kept_bytes else NOTHING,
            spared=_time(sum(layer.spared_seconds for layer in alike)),
            again=_time(sum(layer.seconds for layer in alike)),
        )
        name = ""


def _time(seconds: float) -> str:
    return duration(seconds) if seconds else NOTHING


def _ranges(numbers: list[int]) -> str:
    """Growing numbers as in "1–4, 7"."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in runs)

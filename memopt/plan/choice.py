"""How much each layer recomputes so that a step stays within a memory budget and takes the least time.

The regions of a step are nested in time: the first to run forward is the last to run backward. While the n-th runs,
what the layers of the first n keep is held, and beside it whatever the region itself needs. So a budget limits each sum
over the first n regions, and the best choice is found region by region: for every amount of memory held so far, only
the quickest choice that holds no more can be part of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from memopt.ir import Level

STATES = 16384
"""Amounts of memory that are told apart: kept bytes are rounded up to this share of what all layers can keep."""

SMALLEST_UNIT_BYTES = 512


@dataclass(frozen=True, slots=True)
class Option:
    """A level for a layer.

    Attributes:
        level: how much is computed again.
        kept_bytes: what the layer then keeps from forward to backward, beyond its feature.
        seconds: predicted time for computing the rest again.
    """

    level: Level
    kept_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Layer:
    """Something that is given one level.

    Attributes:
        path: by which it is known.
        options: at least one.
    """

    path: str
    options: tuple[Option, ...]


@dataclass(frozen=True, slots=True)
class Stage:
    """A region of a step.

    Attributes:
        layers: in the order of forward.
        needed_bytes: by level, most that is allocated while the region runs beside what layers keep, where its layers
            have that level.
    """

    layers: tuple[Layer, ...]
    needed_bytes: dict[Level, int]


@dataclass(frozen=True, slots=True)
class _Front:
    """Choices of which none is beaten by another in both memory and time, by growing memory.

    Attributes:
        units: memory held, (n,) int64.
        seconds: (n,) float64, falling.
        nodes: where each choice is written down, (n,) int64.
    """

    units: torch.Tensor
    seconds: torch.Tensor
    nodes: torch.Tensor


class _Ledger:
    """Which option was taken, and after which choice: a tree of choices, written down layer by layer."""

    def __init__(self) -> None:
        self._count = 1
        self._starts: list[int] = [0]
        self._parents: list[torch.Tensor] = [torch.tensor([-1])]
        self._options: list[torch.Tensor] = [torch.tensor([-1])]

    def write(self, parents: torch.Tensor, options: torch.Tensor) -> torch.Tensor:
        """New choices; returns their nodes."""
        nodes = torch.arange(self._count, self._count + len(parents))
        self._starts.append(self._count)
        self._parents.append(parents)
        self._options.append(options)
        self._count += len(parents)
        return nodes

    def read(self, node: int) -> list[int]:
        """The options that led to a choice, the first layer's first."""
        taken: list[int] = []
        for start, parents, options in zip(self._starts[::-1], self._parents[::-1], self._options[::-1], strict=True):
            if 0 < start <= node < start + len(parents):
                taken.append(int(options[node - start]))
                node = int(parents[node - start])
        return taken[::-1]


def choose_levels(stages: Sequence[Stage], budget_bytes: int) -> dict[str, Level] | None:
    """The level of each layer such that nothing exceeds the budget and the sum of seconds is least.

    A larger budget never takes more time. Kept bytes are rounded up to a unit that does not depend on the budget, so
    the result is the best of all choices but for that rounding, and never exceeds the budget.

    Args:
        stages: in the order of forward. No two layers have the same path.
        budget_bytes: of everything allocated at any moment.

    Returns:
        Levels by path; None where even the least exceeds the budget.
    """
    unit_bytes = unit_bytes_of(stages)
    with torch.device("cpu"):
        ledger = _Ledger()
        front = _Front(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64), torch.zeros(1).long())
        for stage in stages:
            front = _through(stage, front, budget_bytes, unit_bytes, ledger)
            if not len(front.units):
                return None
        taken = ledger.read(int(front.nodes[-1]))
    layers = [layer for stage in stages for layer in stage.layers]
    return {layer.path: layer.options[number].level for layer, number in zip(layers, taken, strict=True)}


def unit_bytes_of(stages: Sequence[Stage]) -> int:
    """What the kept bytes of each layer are rounded up to multiples of."""
    most_bytes = sum(max(o.kept_bytes for o in layer.options) for stage in stages for layer in stage.layers)
    return max(SMALLEST_UNIT_BYTES, -(-most_bytes // STATES))


def _through(stage: Stage, before: _Front, budget_bytes: int, unit_bytes: int, ledger: _Ledger) -> _Front:
    """Choices for one region more. It needs what the hungriest of its layers' levels needs."""
    fronts = []
    for needed_bytes in sorted(set(stage.needed_bytes.values())):
        levels = {level for level, needed in stage.needed_bytes.items() if needed <= needed_bytes}
        limit = (budget_bytes - needed_bytes) // unit_bytes
        front = _quickest(before.units, before.seconds, before.nodes, limit)
        for layer in stage.layers:
            options = [(number, o) for number, o in enumerate(layer.options) if o.level in levels]
            front = _one_layer_more(front, options, limit, unit_bytes, ledger)
        fronts.append(front)
    units, seconds, nodes = (torch.cat([getattr(front, name) for front in fronts]) for name in _Front.__slots__)
    return _quickest(units, seconds, nodes, None)


def _one_layer_more(
    front: _Front, options: list[tuple[int, Option]], limit: int, unit_bytes: int, ledger: _Ledger
) -> _Front:
    if not options:
        return _quickest(front.units, front.seconds, front.nodes, -1)
    units = torch.cat([front.units + -(-option.kept_bytes // unit_bytes) for _, option in options])
    seconds = torch.cat([front.seconds + option.seconds for _, option in options])
    parents = front.nodes.repeat(len(options))
    numbers = torch.tensor([number for number, _ in options]).repeat_interleave(len(front.nodes))
    places = torch.arange(len(units))
    best = _quickest(units, seconds, places, limit)
    nodes = ledger.write(parents[best.nodes], numbers[best.nodes])
    return _Front(best.units, best.seconds, nodes)


def _quickest(units: torch.Tensor, seconds: torch.Tensor, nodes: torch.Tensor, limit: int | None) -> _Front:
    """Of choices within the limit those that are quicker than every one that holds no more."""
    order = torch.argsort(seconds, stable=True)
    order = order[torch.argsort(units[order], stable=True)]
    if limit is not None:
        order = order[units[order] <= limit]
    units, seconds, nodes = units[order], seconds[order], nodes[order]
    if not len(order):
        return _Front(units, seconds, nodes)
    best_before = torch.cat([torch.full((1,), torch.inf, dtype=torch.float64), seconds.cummin(0).values[:-1]])
    quicker = seconds < best_before
    return _Front(units[quicker], seconds[quicker], nodes[quicker])

"""Levels for a memory budget: what each layer keeps, from predicted steps at each level.

A step is predicted with every layer at one level, for each level; `explain` says what each layer then keeps and
computes again. From these `plan.choice` finds the quickest levels within the budget, which are predicted once more.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from memopt.budget.stages import Predicted, known, layers_of, stages_of, useful_levels
from memopt.errors import BudgetError
from memopt.ir import MIB, Explanation, Level, MemoryPlan, PlannedLayer, whole_mebibytes
from memopt.measure.memory import leave
from memopt.measure.predict import PredictionError, predict
from memopt.measure.step import Inputs, MakeModel, StepError
from memopt.measure.target import GPU, Target
from memopt.plan.choice import Layer, Stage, choose_levels, unit_bytes_of

MARGIN = 0.01
"""Share of the budget that is left free: predictions are about that good."""
MARGIN_BYTES = 2 * MIB
AMOUNTS = 1024
"""Amounts of memory, from the least to the most that any choice needs, for which one is made."""
UNSPENT = 0.0025
"""Share of the budget that is not worth another predicted step."""


@dataclass(frozen=True, slots=True)
class Rewriting:
    """How a model is rewritten to be predicted.

    Attributes:
        remove: takes memopt off a model.
        apply: with the level of each layer by its path, or one level for all.
        explain: what was done with a model.
    """

    remove: Callable[[nn.Module], nn.Module]
    apply: Callable[[nn.Module, Level | Mapping[str, Level]], nn.Module]
    explain: Callable[[nn.Module], Explanation]


def plan_within(
    budget_bytes: int,
    make_model: MakeModel,
    inputs: Inputs,
    rewriting: Rewriting,
    *,
    amp: torch.dtype | None = None,
    target: Target = GPU,
) -> MemoryPlan:
    """The levels that take least time within a budget.

    Counted is the peak allocated of a training step on `target` as `measure` runs it: with gradients and one momentum
    for each parameter. 1 % of the budget and 2 MiB are left free.

    Args:
        budget_bytes: of everything allocated at any moment.
        make_model: builds a fresh model on the CPU, in the mode that it is trained in.
        inputs: positional arguments of forward; of tensors only the kind is read.
        rewriting: how a model is rewritten.
        amp: autocast dtype or None.
        target: the machine predicted for.

    Raises:
        BudgetError: the least possible exceeds the budget, or the step cannot be predicted.
    """
    return _Planner(budget_bytes, make_model, inputs, rewriting, amp, target).plan()


@dataclass(frozen=True, slots=True)
class _Planner:
    _budget_bytes: int
    _make_model: MakeModel
    _inputs: Inputs
    _rewriting: Rewriting
    _amp: torch.dtype | None
    _target: Target

    @property
    def _usable_bytes(self) -> int:
        return int(self._budget_bytes * (1 - MARGIN)) - MARGIN_BYTES

    def plan(self) -> MemoryPlan:
        """The quickest levels."""
        layer = self._rewritten("layer")
        # Eager is as quick as exact kernels: what fits may stay as it is. Where memopt needs no less, it does anyway.
        may_stay = layer.numerics == "exact"
        naive = self._predicted(leave) if may_stay or _may_need_more_than_naive(layer) else None
        if naive is not None and naive.peak_bytes <= self._usable_bytes:
            reason = _reason_to_stay(naive, layer, may_stay)
            if reason is not None:
                kept = tuple(
                    PlannedLayer(c.module, c.block, "keep", c.saved_bytes, 0.0, 0.0, 0.0) for c in layer.chains
                )
                return self._plan(kept, naive, layer, stays_because=reason)
        uniform = {level: self._rewritten(level) for level in useful_levels(layer.chains)} | {"layer": layer}
        layers = layers_of(uniform, self._target)
        stages = stages_of(uniform, layers)
        amounts = _extremes(stages)
        least = self._least(stages, layer, amounts[0])
        least_bytes = _budget_for(min(p.peak_bytes for p in (least[1], naive) if p is not None))
        levels, whole = self._fitting(stages, *amounts) or least
        if whole.peak_bytes > self._usable_bytes:
            raise self._too_little(least_bytes, layer)
        blocks = {chain.module: chain.block for chain in layer.chains}
        return self._plan(_planned(levels, layers, blocks), whole, layer, least_bytes)

    def _fitting(
        self, stages: list[Stage], least_bytes: int, most_bytes: int
    ) -> tuple[dict[str, Level], Predicted] | None:
        """The quickest levels that are predicted to fit, as a whole, which may need more than its parts say.

        The amount of memory that they are chosen for is found by halving, with the same amounts for every budget:
        where a larger budget first goes another way than a smaller one, it goes up. So it never ends below. Nor does it
        end before: what nearly spends it spends the smaller one even more.
        """
        wholes: dict[tuple[Level, ...], Predicted] = {}  # nearby amounts often give the same levels

        def fitting(amount_bytes: int) -> tuple[dict[str, Level], Predicted] | None:
            levels = choose_levels(stages, amount_bytes) if amount_bytes <= self._usable_bytes else None
            if levels is None:
                return None
            chosen = tuple(levels.values())
            if chosen not in wholes:
                wholes[chosen] = self._rewritten(levels)
            return (levels, wholes[chosen]) if wholes[chosen].peak_bytes <= self._usable_bytes else None

        best: tuple[dict[str, Level], Predicted] | None = None
        low, high = -1, AMOUNTS + 1
        while high - low > 1:
            number = (low + high) // 2
            found = fitting(least_bytes + (most_bytes - least_bytes) * number // AMOUNTS)
            if found is None:
                high = number
                continue
            best, low = found, number
            if best[1].peak_bytes >= (1 - UNSPENT) * self._usable_bytes:
                break
        return best

    def _least(self, stages: list[Stage], layer: Predicted, amount_bytes: int) -> tuple[dict[str, Level], Predicted]:
        """The levels that need least, the quicker of two that need as much: a few layers that keep something can need
        less than none."""
        levels = _choice(stages, amount_bytes)
        nothing: dict[str, Level] = dict.fromkeys(levels, "layer")
        choices = [(nothing, layer)] if levels == nothing else [(levels, self._rewritten(levels)), (nothing, layer)]
        return min(choices, key=lambda choice: choice[1].peak_bytes)

    def _too_little(self, least_bytes: int, layer: Predicted) -> BudgetError:
        return BudgetError(
            # The budget is rounded down and the least up, so that they never look alike.
            f"The memory budget is {self._budget_bytes // MIB:,} MiB; the least that a training step of "
            f"{type(self._make_model()).__name__} can be kept within is {whole_mebibytes(least_bytes)} (predicted for "
            f"a {self._target.name}, numerics {layer.numerics}, {MARGIN:.0%} and {MARGIN_BYTES // MIB} MiB left free). "
            "Give that, or choose a smaller batch.",
            least_bytes,
        )

    def _plan(
        self,
        layers: tuple[PlannedLayer, ...],
        whole: Predicted,
        layer: Predicted,
        least_bytes: int | None = None,
        stays_because: str | None = None,
    ) -> MemoryPlan:
        return MemoryPlan(
            budget_bytes=self._budget_bytes,
            target=self._target.name,
            numerics=layer.numerics,
            layers=layers,
            peak_allocated_bytes=whole.peak_bytes,
            largest_peak_bytes=known(whole.prediction.largest.peak_allocated_bytes),
            peak_reserved_bytes=whole.prediction.figures.peak_reserved_bytes,
            seconds=sum(layer.seconds for layer in layers),
            least_bytes=least_bytes,
            stays_because=stays_because,
        )

    def _rewritten(self, levels: Level | Mapping[str, Level]) -> Predicted:
        return self._predicted(lambda model: self._rewriting.apply(model, levels))

    def _predicted(self, apply: Callable[[nn.Module], nn.Module]) -> Predicted:
        models: list[nn.Module] = []

        def applied(model: nn.Module) -> nn.Module:
            models.append(apply(model))
            return models[0]

        try:
            prediction = predict(self._make_model, self._inputs, self._target, amp=self._amp, apply=applied)
        except (PredictionError, StepError) as error:
            raise BudgetError(f"No levels can be chosen for a memory budget: {error}") from error
        return Predicted(prediction, self._rewriting.explain(models[0]).rewritten)


def _extremes(stages: list[Stage]) -> tuple[int, int]:
    """The least amount of memory that there is a choice for, nearly, and one that suffices for the quickest."""
    most_kept = [max(option.kept_bytes for option in layer.options) for stage in stages for layer in stage.layers]
    rounding = len(most_kept) * unit_bytes_of(stages)
    ample = sum(most_kept) + rounding + max(max(stage.needed_bytes.values()) for stage in stages)
    low, high = 0, ample
    while high - low > MARGIN_BYTES // 2:
        middle = (low + high) // 2
        low, high = (middle, high) if choose_levels(stages, middle) is None else (low, middle)
    return high, max(_needed_bytes(stages, _choice(stages, ample)) + rounding, high)


def _choice(stages: list[Stage], amount_bytes: int) -> dict[str, Level]:
    """For an amount that is known to suffice."""
    levels = choose_levels(stages, amount_bytes)
    assert levels is not None
    return levels


def _needed_bytes(stages: list[Stage], levels: Mapping[str, Level]) -> int:
    """What a choice needs, by its parts."""
    kept_bytes = most_bytes = 0
    for stage in stages:
        chosen = [next(o for o in layer.options if o.level == levels[layer.path]) for layer in stage.layers]
        kept_bytes += sum(option.kept_bytes for option in chosen)
        needed = [stage.needed_bytes[level] for level in {option.level for option in chosen}]
        most_bytes = max(most_bytes, kept_bytes + max(needed, default=min(stage.needed_bytes.values())))
    return most_bytes


def _budget_for(peak_bytes: int) -> int:
    """The least budget that leaves the margin free beside a peak."""
    return int((peak_bytes + MARGIN_BYTES) / (1 - MARGIN)) + 1


def _may_need_more_than_naive(layer: Predicted) -> bool:
    """Whether the untouched model's peak may be below: it is at least what memopt spares, for that is kept at once."""
    return sum(chain.saved_bytes for chain in layer.chains) < layer.peak_bytes


def _reason_to_stay(naive: Predicted, layer: Predicted, may_stay: bool) -> str | None:
    """Why a model whose step fits stays as it is, if it does."""
    if may_stay or not layer.chains:
        return "the memory budget has room for it as it is"
    if naive.peak_bytes <= layer.peak_bytes:
        return (
            f"the model as it is needs {whole_mebibytes(naive.peak_bytes)} and memopt, with the workspaces of its "
            f"kernels, {whole_mebibytes(layer.peak_bytes)}"
        )
    return None


def _planned(
    levels: Mapping[str, Level], layers: Mapping[str, Layer], blocks: Mapping[str, int]
) -> tuple[PlannedLayer, ...]:
    planned = []
    for path, layer in layers.items():
        (option,) = (option for option in layer.options if option.level == levels[path])
        least, most = (extreme(o.seconds for o in layer.options) for extreme in (min, max))
        times = option.seconds, most - option.seconds, option.seconds - least
        planned.append(PlannedLayer(path, blocks[path], option.level, option.kept_bytes, *times))
    return tuple(planned)

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
from memopt.ir import Explanation, Level, MemoryPlan, PlannedLayer
from memopt.measure.memory import StepFigures, leave
from memopt.measure.predict import Prediction, PredictionError, predict
from memopt.measure.step import Inputs, MakeModel, StepError
from memopt.measure.target import GPU, Target
from memopt.plan.choice import Layer, Stage, choose_levels

MARGIN = 0.01
"""Share of the budget that is left free: predictions are about that good."""
MARGIN_BYTES = 2 * 2**20
ATTEMPTS = 4
"""How often a choice that exceeds the budget as a whole is made again with less."""


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
    may_stay: bool,
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
        may_stay: whether a model that fits as it is may stay so: eager is as quick as memopt there.
        amp: autocast dtype or None.
        target: the machine predicted for.

    Raises:
        BudgetError: the least possible exceeds the budget, or the step cannot be predicted.
    """
    return _Planner(budget_bytes, make_model, inputs, rewriting, amp, target).plan(may_stay)


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

    def plan(self, may_stay: bool) -> MemoryPlan:
        """The quickest levels."""
        least = self._rewritten("layer")
        if may_stay or not least.chains:
            naive = self._predict(leave)
            if known(naive.figures.peak_allocated_bytes) <= self._usable_bytes:
                kept = tuple(PlannedLayer(c.module, c.block, "keep", c.saved_bytes, 0.0, 0.0) for c in least.chains)
                return self._plan(kept, naive.figures, least, untouched=True)
        uniform = {level: self._rewritten(level) for level in useful_levels(least.chains)} | {"layer": least}
        layers = layers_of(uniform, self._target)
        stages = stages_of(uniform, layers)
        blocks = {chain.module: chain.block for chain in least.chains}
        fitting = self._fitting(stages)
        if fitting is None:
            floor = self._least(stages)
            everything: dict[str, Level] = dict.fromkeys(layers, "layer")
            fitting = min(((everything, least), floor), key=lambda choice: choice[1].peak_bytes)
        levels, whole = fitting
        if whole.peak_bytes > self._usable_bytes:
            raise self._too_little(whole.peak_bytes)
        return self._described(levels, layers, blocks, whole, least)

    def _fitting(self, stages: list[Stage]) -> tuple[dict[str, Level], Predicted] | None:
        """The quickest levels that are predicted to fit, as a whole."""
        usable_bytes = self._usable_bytes
        for _ in range(ATTEMPTS):
            levels = choose_levels(stages, usable_bytes)
            if levels is None:
                return None
            whole = self._rewritten(levels)
            if whole.peak_bytes <= self._usable_bytes:
                return levels, whole
            usable_bytes -= whole.peak_bytes - self._usable_bytes
        return None

    def _least(self, stages: list[Stage]) -> tuple[dict[str, Level], Predicted]:
        """The levels that need least: a few layers that keep something can need less than none."""
        low, high = 0, 2 * max(max(stage.needed_bytes.values()) for stage in stages)
        levels: dict[str, Level] = {}
        while high - low > MARGIN_BYTES // 2 or not levels:
            middle = (low + high) // 2
            chosen = choose_levels(stages, middle)
            low, high, levels = (middle, high, levels) if chosen is None else (low, middle, chosen)
        return levels, self._rewritten(levels)

    def _too_little(self, least_bytes: int) -> BudgetError:
        needed_bytes = int((least_bytes + MARGIN_BYTES) / (1 - MARGIN)) + 1
        return BudgetError(
            f"The memory budget is {_mib(self._budget_bytes)}; the least that a training step of "
            f"{type(self._make_model()).__name__} can be kept within is {_mib(needed_bytes)} (predicted). Give that, "
            "or choose a smaller batch.",
            needed_bytes,
        )

    def _described(
        self,
        levels: Mapping[str, Level],
        layers: dict[str, Layer],
        blocks: dict[str, int],
        whole: Predicted,
        least: Predicted,
    ) -> MemoryPlan:
        planned = []
        for path, layer in layers.items():
            (option,) = (option for option in layer.options if option.level == levels[path])
            most = max(o.seconds for o in layer.options)
            spared = most - option.seconds
            planned.append(PlannedLayer(path, blocks[path], option.level, option.kept_bytes, option.seconds, spared))
        return self._plan(tuple(planned), whole.prediction.figures, least)

    def _plan(
        self, layers: tuple[PlannedLayer, ...], figures: StepFigures, least: Predicted, untouched: bool = False
    ) -> MemoryPlan:
        return MemoryPlan(
            budget_bytes=self._budget_bytes,
            layers=layers,
            peak_allocated_bytes=known(figures.peak_allocated_bytes),
            peak_reserved_bytes=figures.peak_reserved_bytes,
            least_bytes=min(least.peak_bytes, known(figures.peak_allocated_bytes)),
            seconds=sum(layer.seconds for layer in layers),
            untouched=untouched,
        )

    def _rewritten(self, levels: Level | Mapping[str, Level]) -> Predicted:
        models: list[nn.Module] = []

        def apply(model: nn.Module) -> nn.Module:
            models.append(self._rewriting.apply(model, levels))
            return models[0]

        prediction = self._predict(apply)
        return Predicted(prediction, self._rewriting.explain(models[0]).rewritten)

    def _predict(self, apply: Callable[[nn.Module], nn.Module]) -> Prediction:
        try:
            return predict(self._make_model, self._inputs, self._target, amp=self._amp, apply=apply)
        except (PredictionError, StepError) as error:
            raise BudgetError(f"No levels can be chosen for a memory budget: {error}") from error


def _mib(size_bytes: int) -> str:
    return f"{-(-size_bytes // 2**20):,} MiB"

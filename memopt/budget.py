"""Levels for a memory budget: what each layer keeps, from predicted steps at each level.

A step is predicted with every layer at one level, for each level; `explain` says what each layer then keeps and
computes again. From these `plan.choice` finds the quickest levels within the budget, which are predicted once more.
"""

import copy
import inspect
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from memopt.errors import BudgetError
from memopt.ir import ChainReport, Explanation, Level, MemoryPlan, PlannedLayer, waits_for_others
from memopt.measure.memory import StepFigures, leave
from memopt.measure.predict import Prediction, PredictionError, predict
from memopt.measure.regions import region_peaks
from memopt.measure.step import Inputs, MakeModel, StepError
from memopt.measure.target import GPU, Target
from memopt.plan.choice import Layer, Option, Stage, choose_levels

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


@dataclass(frozen=True, slots=True)
class _Predicted:
    prediction: Prediction
    chains: tuple[ChainReport, ...]

    @property
    def peak_bytes(self) -> int:
        """Allocated, workspaces that were never measured at their estimates."""
        return _bytes(self.prediction.figures.peak_allocated_bytes)


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


def plan_call(
    budget_bytes: int,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    rewriting: Rewriting,
    *,
    may_stay: bool,
) -> MemoryPlan:
    """The same for a call of a model, in its mode and in the autocast that is in force.

    The model is copied without its data; nothing is computed and no state of the user's changes.

    Args:
        budget_bytes, rewriting, may_stay: as `plan_within` takes them.
        model: on any device.
        args, kwargs: of the call.

    Raises:
        BudgetError: there is no plan; the step waits for other processes, say.
    """
    waits = waits_for_others(model)
    if waits is not None:
        raise BudgetError(f"{waits} waits for other processes, so no step can be predicted. Choose Config.recompute.")
    try:
        inputs = inspect.signature(model.forward).bind(*args, **kwargs)
    except (TypeError, ValueError) as error:
        raise BudgetError(f"The inputs of {type(model).__name__} cannot be put in order: {error}.") from error
    if inputs.kwargs:
        raise BudgetError(f"{', '.join(inputs.kwargs)} can only be passed by name, so no step can be predicted.")
    device_type = next((p.device.type for p in model.parameters()), "cpu")
    amp = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    with _disable_current_modes(), torch.autocast(device_type, enabled=False), torch.enable_grad():
        return plan_within(
            budget_bytes,
            lambda: rewriting.remove(_without_data(model)),
            inputs.args,
            rewriting,
            may_stay=may_stay,
            amp=amp,
        )


def _without_data(model: nn.Module) -> nn.Module:
    """A copy on the CPU whose parameters and buffers have their shapes and strides and no values."""
    memo: dict[int, torch.Tensor] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
    return copy.deepcopy(model, memo)


class _Planner:
    def __init__(
        self,
        budget_bytes: int,
        make_model: MakeModel,
        inputs: Inputs,
        rewriting: Rewriting,
        amp: torch.dtype | None,
        target: Target,
    ) -> None:
        self._budget_bytes, self._make_model, self._inputs = budget_bytes, make_model, inputs
        self._rewriting, self._amp, self._target = rewriting, amp, target
        self._usable_bytes = int(budget_bytes * (1 - MARGIN)) - MARGIN_BYTES

    def plan(self, may_stay: bool) -> MemoryPlan:
        """The quickest levels."""
        least = self._rewritten("layer")
        if may_stay or not least.chains:
            naive = self._predict(leave)
            if _bytes(naive.figures.peak_allocated_bytes) <= self._usable_bytes:
                kept = tuple(PlannedLayer(c.module, c.block, "keep", c.saved_bytes, 0.0, 0.0) for c in least.chains)
                return self._plan(kept, naive.figures, least, untouched=True)
        uniform = {level: self._rewritten(level) for level in _levels(least.chains)} | {"layer": least}
        layers = _layers(uniform, self._target)
        stages = _stages(uniform, layers)
        blocks = {chain.module: chain.block for chain in least.chains}
        levels, whole = self._fitting(stages, least)
        if levels is None and least.peak_bytes <= self._usable_bytes:
            levels, whole = dict.fromkeys(layers, "layer"), least
        if levels is None:
            raise BudgetError(self._too_little(min(least.peak_bytes, self._least(stages, least))))
        return self._described(levels, layers, blocks, whole, least)

    def _fitting(self, stages: list[Stage], least: _Predicted) -> tuple[Mapping[str, Level] | None, _Predicted]:
        """The quickest levels that are predicted to fit, as a whole."""
        usable_bytes = self._usable_bytes
        for _ in range(ATTEMPTS):
            levels = choose_levels(stages, usable_bytes)
            if levels is None:
                break
            whole = self._rewritten(levels)
            if whole.peak_bytes <= self._usable_bytes:
                return levels, whole
            usable_bytes -= whole.peak_bytes - self._usable_bytes
        return None, least

    def _least(self, stages: list[Stage], least: _Predicted) -> int:
        """Peak of the levels that need least: a few layers that keep something can need less than none."""
        low, high = 0, 2 * least.peak_bytes
        while high - low > MARGIN_BYTES // 2:
            middle = (low + high) // 2
            low, high = (low, middle) if choose_levels(stages, middle) is not None else (middle, high)
        levels = choose_levels(stages, high)
        return least.peak_bytes if levels is None else self._rewritten(levels).peak_bytes

    def _too_little(self, least_bytes: int) -> str:
        needed_bytes = int((least_bytes + MARGIN_BYTES) / (1 - MARGIN)) + 1
        return (
            f"The memory budget is {_mib(self._budget_bytes)}; the least that a training step of "
            f"{type(self._make_model()).__name__} can be kept within is {_mib(needed_bytes)} (predicted). Give that, "
            "or choose a smaller batch."
        )

    def _described(
        self,
        levels: Mapping[str, Level],
        layers: dict[str, Layer],
        blocks: dict[str, int],
        whole: _Predicted,
        least: _Predicted,
    ) -> MemoryPlan:
        planned = []
        for path, layer in layers.items():
            (option,) = (option for option in layer.options if option.level == levels[path])
            most = max(o.seconds for o in layer.options)
            spared = most - option.seconds
            planned.append(PlannedLayer(path, blocks[path], option.level, option.kept_bytes, option.seconds, spared))
        return self._plan(tuple(planned), whole.prediction.figures, least)

    def _plan(
        self, layers: tuple[PlannedLayer, ...], figures: StepFigures, least: _Predicted, untouched: bool = False
    ) -> MemoryPlan:
        return MemoryPlan(
            budget_bytes=self._budget_bytes,
            layers=layers,
            peak_allocated_bytes=_bytes(figures.peak_allocated_bytes),
            peak_reserved_bytes=figures.peak_reserved_bytes,
            least_bytes=min(least.peak_bytes, _bytes(figures.peak_allocated_bytes)),
            seconds=sum(layer.seconds for layer in layers),
            untouched=untouched,
        )

    def _rewritten(self, levels: Level | Mapping[str, Level]) -> _Predicted:
        models: list[nn.Module] = []

        def apply(model: nn.Module) -> nn.Module:
            models.append(self._rewriting.apply(model, levels))
            return models[0]

        prediction = self._predict(apply)
        return _Predicted(prediction, self._rewriting.explain(models[0]).rewritten)

    def _predict(self, apply: Callable[[nn.Module], nn.Module]) -> Prediction:
        try:
            return predict(self._make_model, self._inputs, self._target, amp=self._amp, apply=apply)
        except (PredictionError, StepError) as error:
            raise BudgetError(f"No levels can be chosen for a memory budget: {error}") from error


def _levels(chains: tuple[ChainReport, ...]) -> tuple[Level, ...]:
    """Levels beside "layer" that may be of use: on fused kernels "keep" is no other than "concat"."""
    return ("concat", "keep") if any(chain.numerics == "exact" for chain in chains) else ("concat",)


def _layers(uniform: Mapping[Level, _Predicted], target: Target) -> dict[str, Layer]:
    """The options of each layer, by its path: chains of one path have one level."""
    least = _saved(uniform["layer"].chains)
    options: dict[str, list[Option]] = defaultdict(list)
    for level in ("layer", "concat", "keep"):
        if level not in uniform:
            continue
        saved, seconds = _saved(uniform[level].chains), _seconds(uniform[level].chains, target)
        for path, saved_bytes in saved.items():
            options[path].append(Option(level, max(0, least[path] - saved_bytes), seconds[path]))
    return {path: Layer(path, tuple(own)) for path, own in options.items()}


def _saved(chains: tuple[ChainReport, ...]) -> dict[str, int]:
    totals: dict[str, int] = defaultdict(int)
    for chain in chains:
        totals[chain.module] += chain.saved_bytes
    return totals


def _seconds(chains: tuple[ChainReport, ...], target: Target) -> dict[str, float]:
    totals: dict[str, float] = defaultdict(float)
    for chain in chains:
        totals[chain.module] += target.seconds(chain.recomputed_bytes, chain.recomputed_flops)
    return totals


def _stages(uniform: Mapping[Level, _Predicted], layers: dict[str, Layer]) -> list[Stage]:
    """The regions of the step with what they need; all as one where they are not nested in time."""
    chains = uniform["layer"].chains
    peaks = {level: region_peaks(p.prediction.trace, p.prediction.step_from) for level, p in uniform.items()}
    names = [name for name, _ in peaks["layer"].inside] if peaks["layer"] is not None else []
    alike = all(p is not None and [name for name, _ in p.inside] == names for p in peaks.values())
    if not alike or {chain.region for chain in chains} != set(names):
        kept = {level: sum(_kept(layer, level) for layer in layers.values()) for level in uniform}
        return [Stage(tuple(layers.values()), {level: p.peak_bytes - kept[level] for level, p in uniform.items()})]
    first: dict[str, str] = {}  # a layer that runs in several regions keeps from the first on
    for chain in sorted(chains, key=lambda chain: names.index(chain.region)):
        first.setdefault(chain.module, chain.region)
    stages = [Stage((), {level: p.after for level, p in peaks.items() if p is not None})]
    held = dict.fromkeys(uniform, 0)
    for number, name in enumerate(names):
        own = tuple(layers[path] for path, region in first.items() if region == name)
        needed: dict[Level, int] = {}
        for level, peak in peaks.items():
            assert peak is not None
            held[level] += sum(_kept(layer, level) for layer in own)
            needed[level] = peak.inside[number][1] - held[level]
        stages.append(Stage(own, needed))
    return stages


def _kept(layer: Layer, level: Level) -> int:
    return next((option.kept_bytes for option in layer.options if option.level == level), 0)


def _bytes(size_bytes: int | None) -> int:
    assert size_bytes is not None
    return size_bytes


def _mib(size_bytes: int) -> str:
    return f"{-(-size_bytes // 2**20):,} MiB"

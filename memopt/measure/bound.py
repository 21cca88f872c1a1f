"""Whether fused kernels stay as close to the true numbers as eager does.

Numbers that are not bit-identical are judged by their distance from a float64 run of the untouched model, beside
eager's own distance, with fresh inputs and random numbers for each seed. Over the seeds the median counts: one
activation that rounds to the other side of a kink moves a small model's gradients by a thousand roundings, in eager
as much as in the kernels, but not in most seeds. In a deep network it does so in most. Where the median is in doubt,
eager is therefore run on weights that are rounded otherwise, too: what that makes of its error is its own error.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from memopt.measure.draws import SameDraws
from memopt.measure.duplicate import duplicate
from memopt.measure.equivalence import Equivalence, check_equivalence, copy_state, put_back
from memopt.measure.norms import Norms, largest_relative
from memopt.measure.step import Inputs, seeded
from memopt.measure.trained import Trained

SEEDS = 5
SHAKES = 4
"""How often at most eager is run on weights rounded otherwise, where there is doubt."""
ONE_BY_ONE = tuple((1, shakes) for shakes in range(SHAKES + 1))
"""Efforts of one seed. A distance never grows by another shake, so to stop at the first that is enough decides the
same as to take them all."""
TOGETHER = 1.25
"""Largest ratio to eager's own error: of outputs, of all gradients together, and of the median parameter."""
TOGETHER_ON_CPU = 2.0
"""The same on a CPU, where eager's batch norm sums in float64 and is nearer to float64 than any GPU's."""
ONE_PARAMETER = 2.0
"""Largest ratio for 95 of 100 parameters."""
BUFFERS = 1e-5
"""Relative difference of a buffer to eager's that needs no excuse."""
_NEAR_ZERO = 0.01
"""A parameter's gradient is not taken for smaller than this share of all gradients when roundings are counted."""


@dataclass(frozen=True, slots=True)
class Distance:
    """How far from float64, as ratios to eager's own distance.

    Attributes:
        outputs: L2 error of the outputs, median over the seeds.
        gradients: L2 error of all gradients together, likewise.
        median_parameter: per parameter the median over the seeds; of those, the median.
        worst_parameters: of those, the 95th percentile.
        buffers: L2 error of all buffers together, likewise.
        buffers_apart: largest L2 norm of (buffer - eager's) over eager's.
        on_cpu: eager ran on a CPU.
    """

    outputs: float
    gradients: float
    median_parameter: float
    worst_parameters: float
    buffers: float
    buffers_apart: float
    on_cpu: bool

    def __str__(self) -> str:
        return (
            f"error against float64 in units of eager's own: outputs {self.outputs:.2f}, all gradients "
            f"{self.gradients:.2f}, median parameter {self.median_parameter:.2f}, 95th percentile "
            f"{self.worst_parameters:.2f}, buffers {self.buffers:.2f} (apart by {self.buffers_apart:.1e})"
        )

    @property
    def within_bound(self) -> bool:
        """No worse than eager's own error allows."""
        limit = TOGETHER_ON_CPU if self.on_cpu else TOGETHER
        each = ONE_PARAMETER * limit / TOGETHER
        together = max(self.outputs, self.gradients, self.median_parameter)
        buffers = self.buffers_apart <= BUFFERS or self.buffers <= limit
        return together <= limit and self.worst_parameters <= each and buffers


@contextmanager
def without_tf32() -> Iterator[None]:
    """Convolutions in full float32, in eager and in the kernels.

    For a few samples cuDNN takes kernels without TF32 also where that is allowed: eager is nearer to float64 then than
    it is at full size, by which nothing can be judged.
    """
    cudnn: Any = torch.backends.cudnn
    try:
        owner, name, off = cudnn, "allow_tf32", cast("Any", False)
        before = cudnn.allow_tf32
    except RuntimeError:  # it cannot be read where the newer setting was used
        owner, name, off = cudnn.conv, "fp32_precision", "ieee"
        before = owner.fp32_precision
    setattr(owner, name, off)
    try:
        yield
    finally:
        setattr(owner, name, before)


def check_bound(
    naive_model: nn.Module,
    rewritten_model: nn.Module,
    batch: Inputs,
    *,
    amp: torch.dtype | None = None,
    seeds: int = SEEDS,
) -> Equivalence:
    """Judge a rewritten model by float64; the flags of equal bits are those of one step beside eager.

    Args:
        naive_model: the untouched model.
        rewritten_model: the same model after memopt, on the same device.
        batch: positional arguments of `forward`, on the models' device; floating tensors stand for their kind: each
            seed draws others of the same mean and deviation.
        amp: autocast dtype or None; float64 runs without.
        seeds: how many runs.

    Both models are left as they were.

    Raises:
        StepError: nothing to train, or an output that no loss can be made from.
    """
    bits = check_equivalence(naive_model, rewritten_model, [batch], steps=1, amp=amp, repeat_eager=False)
    with measuring_distance(naive_model, rewritten_model, amp=amp) as of:
        distance = judged(of(batch), (seeds, 0), (seeds, SHAKES))
    return replace(
        bits,
        numerics="fast",
        passed=distance.within_bound,
        differing=() if distance.within_bound else (str(distance),),
        skipped=(),
    )


def measure_distance(
    naive_model: nn.Module,
    rewritten_model: nn.Module,
    batch: Inputs,
    *,
    amp: torch.dtype | None = None,
    seeds: int = SEEDS,
) -> Distance:
    """The distances that `check_bound` judges."""
    with measuring_distance(naive_model, rewritten_model, amp=amp) as of:
        return of(batch)(seeds, 0)


OverSeeds = Callable[[int, int], Distance]
"""The distance over so many seeds, eager shaken so many times. Of more seeds, only those that are new are run."""


def judged(distance: OverSeeds, *efforts: tuple[int, int]) -> Distance:
    """The first distance that is within the bound, or the last: each effort is seeds and shakes."""
    for seeds, shakes in efforts:
        found = distance(seeds, shakes)
        if found.within_bound:
            break
    return found


@contextmanager
def measuring_distance(
    naive_model: nn.Module, rewritten_model: nn.Module, *, amp: torch.dtype | None = None
) -> Iterator[Callable[[Inputs], OverSeeds]]:
    """A function that measures batches one by one, as `measure_distance` does."""
    with put_back(rewritten_model):
        copy_state(naive_model, rewritten_model)
        models = _Models(naive_model, rewritten_model, amp)
        yield lambda batch: _Runs(models, batch).distance


class _Models:
    """The untouched model, the rewritten one, and the untouched one in float64."""

    def __init__(self, naive: nn.Module, rewritten: nn.Module, amp: torch.dtype | None) -> None:
        self.naive, self.rewritten, self.amp = naive, rewritten, amp
        self.device = next(naive.parameters()).device

    @cached_property
    def wide(self) -> nn.Module:
        """Made when it is first needed: where eager's own step does not fit in memory, it is not."""
        return duplicate(self.naive).double()


class _Runs:
    """The three models trained a step on a batch with each seed."""

    def __init__(self, models: _Models, batch: Inputs) -> None:
        self._models, self._batch = models, batch
        self._ratios: dict[tuple[int, int], dict[str, float]] = {}
        self._buffers_apart = 0.0
        self._latest: _Run | None = None

    def distance(self, seeds: int, shakes: int) -> Distance:
        """Over the first so many seeds."""
        for seed in range(seeds):
            if (seed, shakes) not in self._ratios:
                self._ratios[seed, shakes] = self._run(seed, shakes)
        ratios = [self._ratios[seed, shakes] for seed in range(seeds)]
        median = {name: statistics.median(ratio[name] for ratio in ratios) for name in ratios[0]}
        outputs, gradients, buffers = (median.pop(name) for name in (_OUTPUTS, _GRADIENTS, _BUFFERS))
        each = torch.tensor(list(median.values()), dtype=torch.float64)
        worst = each.quantile(0.95, interpolation="lower").item()
        middle, on_cpu = each.quantile(0.5).item(), self._models.device.type == "cpu"
        return Distance(outputs, gradients, middle, worst, buffers, self._buffers_apart, on_cpu)

    def _run(self, seed: int, shakes: int) -> dict[str, float]:
        if self._latest is None or self._latest.seed != seed:
            self._latest = None  # its memory first
            self._latest = self._train(seed)
        run, models = self._latest, self._models
        for shake in range(len(run.eagers), shakes + 1):
            run.eagers.append(Trained(models.naive, run.inputs, models.amp, seed, run.mode, shake))
        return _ratios(run.exact, run.eagers[: shakes + 1], run.fused)

    def _train(self, seed: int) -> "_Run":
        models = self._models
        inputs, draws = _another(self._batch, seed, models.device), SameDraws()
        eager = Trained(models.naive, inputs, models.amp, seed, draws)
        # Where nothing is drawn, models run as they do in training, and not under a mode: fused regions from tapes.
        mode = draws if draws.any else None
        wide = tree_map_only(torch.Tensor, lambda t: t.double() if t.is_floating_point() else t, inputs)
        exact = Trained(models.wide, wide, None, seed, mode)
        fused = Trained(models.rewritten, inputs, models.amp, seed, mode)
        buffers = ([run.buffers[name] for name in eager.buffers] for run in (eager, fused))
        self._buffers_apart = max(self._buffers_apart, largest_relative(*buffers))
        return _Run(seed, inputs, mode, exact, [eager], fused)


@dataclass(slots=True)
class _Run:
    """What the models made of one seed; `eagers` are the untouched model's steps, those of shaken weights last."""

    seed: int
    inputs: Inputs
    mode: SameDraws | None
    exact: Trained
    eagers: list[Trained]
    fused: Trained


_OUTPUTS, _GRADIENTS, _BUFFERS = "all outputs", "all gradients", "all buffers"


def _another(batch: Inputs, seed: int, device: torch.device) -> Inputs:
    def draw(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point() or seed == 0:
            return tensor.detach()
        mean, deviation = tensor.mean(), tensor.std(correction=0) + (tensor == 0).all()
        return torch.empty_like(tensor).normal_() * deviation + mean

    with seeded(seed, device):
        drawn: Inputs = tree_map_only(torch.Tensor, draw, batch)
    return drawn


def _ratios(exact: Trained, eagers: Sequence[Trained], fused: Trained) -> dict[str, float]:
    names = list(exact.gradients)

    def norms_of(tensors: Callable[[Trained], list[torch.Tensor]]) -> Norms:
        return Norms(tensors(exact), [tensors(eager) for eager in eagers], tensors(fused))

    gradients = norms_of(lambda run: [run.gradients[name] for name in names])
    # A gradient that is zero but for rounding (a bias before a norm) is measured beside the others.
    least = _NEAR_ZERO * math.hypot(*gradients.exact)
    ratios = {name: gradients.ratio([index], least=least) for index, name in enumerate(names)}
    ratios[_GRADIENTS] = gradients.ratio()
    ratios[_OUTPUTS] = norms_of(lambda run: run.outputs).ratio()
    ratios[_BUFFERS] = norms_of(lambda run: list(run.buffers.values())).ratio()
    return ratios

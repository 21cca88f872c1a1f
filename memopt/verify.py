"""Is the rewritten model the untouched one? Asked when `apply` is given example inputs, on copies, on few samples."""

import gc
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from memopt.capture import keeping_python_values, through_checkpoints
from memopt.errors import EquivalenceError
from memopt.ir import ChainReport, Explanation, waits_for_others
from memopt.measure.bound import ONE_BY_ONE, SEEDS, SHAKES, OverSeeds, judged, measuring_distance, without_tf32
from memopt.measure.compare import CHECK_SAMPLES, first_samples
from memopt.measure.equivalence import check_equivalence
from memopt.measure.memory import is_out_of_memory
from memopt.measure.recomputing import recomputing
from memopt.measure.step import Inputs, StepError
from memopt.rewrite import install, installed, uninstall

LARGEST_SIZE = 64
"""Images are cut to this many pixels a side where the model takes that."""


RECOMPUTED = (
    "Verified beside the untouched model with its activations recomputed in backward, on one batch size: a step that "
    "keeps them did not fit in memory."
)
"""What `explain` notes of a verification in little memory."""


@dataclass(frozen=True, slots=True)
class Copies:
    """How to make the copies that are compared.

    Attributes:
        naive: a copy of the model without memopt.
        rewritten: a copy with memopt; given a slice, with those chains alone rewritten (of each of its parts).
        explain: what memopt did with a copy.
    """

    naive: Callable[[], nn.Module]
    rewritten: Callable[[slice | None], nn.Module]
    explain: Callable[[nn.Module], Explanation]


def verify(model: nn.Module, copies: Copies, inputs: Inputs) -> str | None:
    """Train copies side by side: in the model's mode on two batch sizes, and in eval mode.

    Bits are compared, or where some of the model runs on fused kernels, distances from float64: with one seed, or with
    all of them if that one is in doubt.

    Where a step of the untouched model does not fit in memory, again with a copy of it that computes its activations
    again in backward (`memopt.measure.recomputing`), whose bits are the same: in the model's mode, on one batch size.

    Not where other processes take part, who may not be verifying now: this one would wait for them for ever.

    Args:
        model: the user's; it is not touched.
        copies: where its copies come from.
        inputs: positional arguments of forward.

    Returns:
        Why nothing was verified, or how it was where memory was short; else None.

    Raises:
        EquivalenceError: they differ; the message names the first chain and the first tensor that do.
    """
    waits = waits_for_others(model)
    if waits is not None:
        return f"Not verified: {waits} would wait for the other processes."
    chains, few = copies.explain(model).rewritten, first_samples(inputs, CHECK_SAMPLES)
    fused = any(report.numerics == "fast" for report in chains)
    hopeless = sum(report.saved_bytes for report in chains) * _share(few, inputs) > _capacity_bytes(model)
    first = [copies.naive()]
    reusing = replace(copies, naive=lambda: first.pop() if first else copies.naive())
    whole, small = _Trial(reusing, fused), _Trial(_in_little_memory(reusing), fused, small=True)
    try:
        with _nothing_of_the_users(first[0]):
            trials = (small,) if hopeless else (whole, small)
            trial, differing = _first_that_fits(trials, few)
    except StepError as error:
        return f"Not verified: no training step can be made of this model ({error})."
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return "Not verified: the comparison with the untouched model did not fit in memory."
    if differing is None:
        return RECOMPUTED if trial is small else None
    raise EquivalenceError(
        f"{type(model).__name__}: the rewritten model differs from the untouched one, first in {differing} "
        "The model is left as it was. Please report it."
    )


class _Recomputing:
    """Runs a module's own forward, so that its backward needs little memory."""

    def run(self, module: nn.Module, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Nothing of forward is rewritten."""
        with recomputing():
            return plain(module, *args, **kwargs)


def _recompute(model: nn.Module) -> nn.Module:
    """The same model; it and its deep copies compute activations again in backward."""
    install(model, _Recomputing(), _recompute)
    return model


def _in_little_memory(copies: Copies) -> Copies:
    """Copies that compute again what eager keeps; those of which only some chains are rewritten, too."""

    def rewritten(chains: slice | None) -> nn.Module:
        copy = copies.rewritten(chains)
        return copy if chains is None else _recompute(copy)

    def explain(copy: nn.Module) -> Explanation:
        if isinstance(installed(copy), _Recomputing):
            uninstall(copy)
        return copies.explain(copy)

    return Copies(lambda: _recompute(copies.naive()), rewritten, explain)


@contextmanager
def _nothing_of_the_users(naive: nn.Module) -> Iterator[None]:
    """Python values and random numbers are put back, and checkpoints looked through, as memopt does.

    A checkpoint updates running statistics a second time when it recomputes, which no rewritten model does.
    """
    state = random.getstate()
    devices = {tensor.device for tensor in naive.parameters() if tensor.device.type == "cuda"}
    try:
        with (
            keeping_python_values(naive),
            through_checkpoints(),
            torch.enable_grad(),
            torch.random.fork_rng(devices=devices),
        ):
            yield
    finally:
        random.setstate(state)


@dataclass(frozen=True, slots=True)
class _Trial:
    """One way to compare.

    Attributes:
        copies: where copies come from.
        fused: some of the model runs on fused kernels, whose numbers are judged by float64.
        small: in little memory, and in few steps, of which such a model needs long ones.
    """

    copies: Copies
    fused: bool
    small: bool = False

    def difference(self, few: Inputs) -> str | None:
        """The first tensor and the first chain that differ, in training or in eval mode; None if none does."""
        few = _smaller(self.copies, few)
        naive, rewritten = self.copies.naive(), self.copies.rewritten(None)
        differing = self._compare(naive, rewritten, (few,) if self.small else (few, _one_more(few)))
        if differing is None and naive.training and not self.small:
            differing = self._compare(naive.eval(), rewritten.eval(), (few,))
        if differing is None:
            return None
        mode = "" if naive.training else " in eval mode"
        count = len(self.copies.explain(rewritten).rewritten)
        del naive, rewritten
        return f"{differing}{mode}. {_place(self._first_differing_chains(few, count))}"

    def _compare(self, naive: nn.Module, rewritten: nn.Module, batches: tuple[Inputs, ...]) -> str | None:
        """What differs first, if anything does."""
        if self.fused:
            with without_tf32(), measuring_distance(naive, rewritten) as of:
                return next((far for batch in batches if (far := _too_far(of(batch))) is not None), None)
        result = check_equivalence(naive, rewritten, batches, steps=len(batches))
        return None if result.passed else next(iter(result.differing), "its outputs")

    def _first_differing_chains(self, few: Inputs, count: int) -> tuple[ChainReport, ...]:
        """The chain by which the rewritten model goes wrong: with those before it alone it is right.

        Found by halving, for each model is recorded anew. Of a model that is rewritten in parts: one chain of each.
        """
        right, wrong = 0, count
        while wrong - right > 1:
            middle = (right + wrong) // 2
            passed = self._compare(self.copies.naive(), self.copies.rewritten(slice(middle)), (few,)) is None
            right, wrong = (middle, wrong) if passed else (right, middle)
        rewritten = self.copies.rewritten(slice(right, wrong))
        passed = self._compare(self.copies.naive(), rewritten, (few,)) is None
        return () if passed else self.copies.explain(rewritten).rewritten


def _too_far(distance: OverSeeds) -> str | None:
    """How far fused numbers are from float64, if that is too far: with one seed, else with more effort."""
    found = judged(distance, *ONE_BY_ONE, (SEEDS, 0), (SEEDS, SHAKES))
    return None if found.within_bound else str(found)


def _first_that_fits(trials: Sequence[_Trial], few: Inputs) -> tuple[_Trial, str | None]:
    """What the first of the trials finds, or the next where it runs out of memory."""
    *first, last = trials
    for trial in first:
        try:
            return trial, trial.difference(few)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        # Outside the handler: its traceback, whose frames hold copies and their graphs, is gone by now.
        gc.collect()
        torch.cuda.empty_cache()
    return last, last.difference(few)


def _share(few: Inputs, inputs: Inputs) -> float:
    """Of all samples, how many a few are."""
    pairs = [(a, b) for a, b in zip(few, inputs, strict=True) if isinstance(a, torch.Tensor) and a.numel()]
    return max((a.numel() / b.numel() for a, b in pairs), default=1.0)


def _capacity_bytes(model: nn.Module) -> float:
    """What this process may allocate where the model is; nobody says so of a CPU."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type != "cuda":
        return math.inf
    total_bytes = torch.cuda.get_device_properties(device).total_memory
    return float(total_bytes * torch.cuda.get_per_process_memory_fraction(device))


def _place(chains: tuple[ChainReport, ...]) -> str:
    if not chains:
        return "No chain is wrong by itself."
    places = (f"{chain.node} ({chain.module or 'functional'}, {chain.source})" for chain in chains)
    return f"The first chain that differs is {' or '.join(places)}."


def _one_more(few: Inputs) -> Inputs:
    """A second batch size: the first sample once more."""
    sizes = {t.shape[0] for t in few if isinstance(t, torch.Tensor) and t.dim()}

    def longer(tensor: torch.Tensor) -> torch.Tensor:
        if len(sizes) != 1 or not tensor.dim():
            return tensor
        return torch.cat([tensor, tensor[:1]]).requires_grad_(tensor.requires_grad)

    result: Inputs = tree_map_only(torch.Tensor, longer, few)
    return result


def _smaller(copies: Copies, few: Inputs) -> Inputs:
    """Smaller images, where all inputs are images and the untouched model takes them."""
    if not all(isinstance(x, torch.Tensor) and x.dim() > 2 and max(x.shape[2:]) > LARGEST_SIZE for x in few):
        return few
    small = tuple(_cut(x) for x in few)
    try:
        with torch.no_grad():
            copies.naive()(*small)
    except Exception:
        return few
    return small


def _cut(image: Any) -> torch.Tensor:
    window = (slice(None), slice(None), *[slice(0, LARGEST_SIZE)] * (image.dim() - 2))
    whole: torch.Tensor = image[window].contiguous(memory_format=_format(image))
    return whole.detach().requires_grad_(image.requires_grad)


def _format(image: torch.Tensor) -> torch.memory_format:
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(image.dim())
    if last is not None and not image.is_contiguous() and image.is_contiguous(memory_format=last):
        return last
    return torch.contiguous_format

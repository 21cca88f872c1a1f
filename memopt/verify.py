"""Is the rewritten model the untouched one? Asked when `apply` is given example inputs, on copies, on few samples."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from memopt.capture import keeping_python_values, through_checkpoints
from memopt.errors import EquivalenceError
from memopt.ir import ChainReport, Explanation, waits_for_others
from memopt.measure.bound import check_bound, without_tf32
from memopt.measure.compare import CHECK_SAMPLES, first_samples
from memopt.measure.equivalence import Equivalence, check_equivalence
from memopt.measure.memory import is_out_of_memory
from memopt.measure.step import Inputs, StepError

LARGEST_SIZE = 64
"""Images are cut to this many pixels a side where the model takes that."""


@dataclass(frozen=True, slots=True)
class Copies:
    """How to make the copies that are compared.

    Attributes:
        naive: a copy of the model without memopt.
        rewritten: a copy with memopt; given a number, with that chain alone rewritten (of each of its parts).
        explain: what memopt did with a copy.
    """

    naive: Callable[[], nn.Module]
    rewritten: Callable[[int | None], nn.Module]
    explain: Callable[[nn.Module], Explanation]


def verify(model: nn.Module, copies: Copies, inputs: Inputs) -> str | None:
    """Train copies side by side: in the model's mode on two batch sizes, and in eval mode.

    Not where other processes take part, who may not be verifying now: this one would wait for them for ever.

    Args:
        model: the user's; it is not touched.
        copies: where its copies come from.
        inputs: positional arguments of forward.

    Returns:
        Why nothing was verified; None where it was.

    Raises:
        EquivalenceError: they differ; the message names the first chain and the first tensor that do.
    """
    waits = waits_for_others(model)
    if waits is not None:
        return f"Not verified: {waits} would wait for the other processes."
    try:
        with _nothing_of_the_users(copies):
            few = _smaller(copies, first_samples(inputs, CHECK_SAMPLES))
            differing = _difference(copies, few, None)
            if differing is None:
                return None
            place = _place(_first_differing_chains(copies, few))
    except StepError as error:
        return f"Not verified: no training step can be made of this model ({error})."
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return "Not verified: the comparison with the untouched model did not fit in memory."
    raise EquivalenceError(
        f"{type(model).__name__}: the rewritten model differs from the untouched one, first in {differing}. {place} "
        "The model is left as it was. Please report it."
    )


@contextmanager
def _nothing_of_the_users(copies: Copies) -> Iterator[None]:
    """Python values and random numbers are put back, and checkpoints looked through, as memopt does.

    A checkpoint updates running statistics a second time when it recomputes, which no rewritten model does.
    """
    state = random.getstate()
    try:
        with keeping_python_values(copies.naive()), through_checkpoints():
            yield
    finally:
        random.setstate(state)


def _difference(copies: Copies, few: Inputs, chain: int | None) -> str | None:
    """The first tensor that differs, in training on two batch sizes or in eval mode."""
    for batches, training in (((few, _one_more(few)), None), ((few,), False)):
        naive, rewritten = copies.naive(), copies.rewritten(chain)
        if training is not None:
            if not naive.training:
                continue  # compared already
            naive, rewritten = naive.eval(), rewritten.eval()
        result = _compare(copies, naive, rewritten, batches)
        if not result.passed:
            mode = "" if naive.training else " in eval mode"
            return f"{next(iter(result.differing), 'its outputs')}{mode}"
    return None


def _compare(copies: Copies, naive: nn.Module, rewritten: nn.Module, batches: tuple[Inputs, ...]) -> Equivalence:
    with torch.enable_grad():
        first = check_equivalence(naive, rewritten, batches, steps=len(batches))
    fused = any(report.numerics == "fast" for report in copies.explain(rewritten).chains)
    if not fused or first.passed:
        return first
    with without_tf32():
        return check_bound(naive, rewritten, batches[0])


def _first_differing_chains(copies: Copies, few: Inputs) -> tuple[ChainReport, ...]:
    """Rewrite one chain at a time, in the order of execution, until one is wrong by itself.

    Of a model that is rewritten in parts: one chain of each part at a time.
    """
    number = 0
    while True:
        rewritten = copies.rewritten(number)
        result = check_equivalence(copies.naive(), rewritten, [few], steps=1)
        here = copies.explain(rewritten).rewritten
        if not here or not result.passed:
            return here
        number += 1


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

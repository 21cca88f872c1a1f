"""L2 norms of many tensors at once, and errors as ratios of them."""

import math
from collections.abc import Iterable, Iterator, Sequence

import torch

_ROUNDINGS = 5e-7
"""Relative errors below a handful of roundings of float32 count as this: there the order of any sum decides."""
_KINKED = 4.0
"""An error of eager's that roundings of its weights make so many times larger is what kinks make of roundings."""

_AT_ONCE = 2**24
"""Elements of tensors that are subtracted at once: 128 MiB in float64."""


class Norms:
    """L2 norms of tensors, and of eager's and the kernels' differences from them.

    All are read at once: a GPU is waited for a few times, not for each of a network's parameters.

    Args:
        exact: the true tensors.
        eagers: eager's, then what it makes of weights that are rounded otherwise, if that was tried.
        fused: to be judged.
    """

    def __init__(
        self, exact: list[torch.Tensor], eagers: Sequence[list[torch.Tensor]], fused: list[torch.Tensor]
    ) -> None:
        self.exact = norms(exact)
        self._eager_and_fused = eagers[0], fused
        first, *others = (apart(eager, exact) for eager in eagers)
        most = [max(errors) for errors in zip(first, *others, strict=True)]
        pairs = zip(first, most, strict=True)
        self._own = [large if large > _KINKED * own else own for own, large in pairs]
        self._other = apart(fused, exact)

    def ratio(self, which: Sequence[int] | None = None, *, least: float = 0.0) -> float:
        """Fused error over eager's, either no smaller than roundings of the whole, or of a norm of `least`."""
        which = range(len(self.exact)) if which is None else which
        exact, own, other = (math.hypot(*(each[i] for i in which)) for each in (self.exact, self._own, self._other))
        floor = _ROUNDINGS * max(exact, least) + 1e-300
        own, other = max(own, floor), max(other, floor)
        if math.isfinite(own) and math.isfinite(other):
            return other / own
        # Where something is not finite, it must be so in the same places.
        eager, fused = self._eager_and_fused
        same = all(torch.equal(eager[i].isfinite(), fused[i].isfinite()) for i in which)
        return 1.0 if same else math.inf


def largest_relative(reference: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """The largest norm of a difference over that of its reference."""
    pairs = zip(apart(other, reference), norms(reference), strict=True)
    return max([0.0, *(difference / max(norm, 1e-300) for difference, norm in pairs if difference)])


def norms(tensors: list[torch.Tensor]) -> list[float]:
    """In float64."""
    return _read(_norms(tensors[some]) for some in _batches(tensors))


def apart(tensors: list[torch.Tensor], reference: list[torch.Tensor]) -> list[float]:
    """L2 norms of the differences of two lists of tensors, pair by pair."""
    pairs = ((tensors[some], reference[some]) for some in _batches(reference))
    return _read(_norms(torch._foreach_sub(a, b)) for a, b in pairs)


def _batches(tensors: list[torch.Tensor]) -> Iterator[slice]:
    """Parts of a list of tensors of at most so many elements each, for what is made of all of a part at once."""
    start = elements = 0
    for stop, tensor in enumerate(tensors):
        if elements and elements + tensor.numel() > _AT_ONCE:
            yield slice(start, stop)
            start, elements = stop, 0
        elements += tensor.numel()
    if tensors:
        yield slice(start, len(tensors))


def _norms(tensors: list[torch.Tensor] | tuple[torch.Tensor, ...]) -> Sequence[torch.Tensor]:
    # An operator for many tensors: deep networks have thousands, and each call its price.
    return torch._foreach_norm(tensors, dtype=torch.float64)


def _read(found: Iterable[Sequence[torch.Tensor]]) -> list[float]:
    scalars = [norm for some in found for norm in some]
    values: list[float] = torch.stack(scalars).tolist() if scalars else []
    return values

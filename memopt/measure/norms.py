"""L2 norms of many tensors at once, and errors as ratios of them."""

import math
from collections.abc import Iterable, Sequence

import torch

_ROUNDINGS = 5e-7
"""Relative errors below a handful of roundings of float32 count as this: there the order of any sum decides."""
_KINKED = 4.0
"""An error of eager's that roundings of its weights make so many times larger is what kinks make of roundings."""


class Norms:
    """L2 norms of tensors, and of eager's and the kernels' differences from them.

    All are read at once: a GPU is waited for a few times, not for each of a network's parameters.

    Args:
        exact: the true tensors.
        eagers: eager's, then what it makes of weights that are rounded otherwise, if that was tried.
        fused: to be judged.
    """

    def __init__(
        self, exact: Sequence[torch.Tensor], eagers: Sequence[Sequence[torch.Tensor]], fused: Sequence[torch.Tensor]
    ) -> None:
        self.exact = norms(exact)
        self._eager_and_fused = eagers[0], fused
        first, *others = (norms(a - b for a, b in zip(eager, exact, strict=True)) for eager in eagers)
        most = [max(errors) for errors in zip(first, *others, strict=True)]
        pairs = zip(first, most, strict=True)
        self._own = [large if large > _KINKED * own else own for own, large in pairs]
        self._other = norms(a - b for a, b in zip(fused, exact, strict=True))

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


def largest_relative(reference: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> float:
    """The largest norm of a difference over that of its reference."""
    apart = norms(b - a for a, b in zip(reference, other, strict=True))
    pairs = zip(apart, norms(reference), strict=True)
    return max([0.0, *(difference / max(norm, 1e-300) for difference, norm in pairs if difference)])


def norms(tensors: Iterable[torch.Tensor]) -> list[float]:
    """In float64."""
    found = [torch.linalg.vector_norm(t.double()) for t in tensors]
    values: list[float] = torch.stack(found).tolist() if found else []
    return values

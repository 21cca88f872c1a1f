"""Sums of gradients inside one region's backward, in the order in which eager would add them.

The first contribution to a value is taken as it is; later ones are added, in place where the buffer belongs to this
backward. A concat hands slices of its own buffer to its parts, so the features of a block share one buffer, and parts
that lie side by side in it are added in one kernel instead of one each.
"""

from dataclasses import dataclass

import torch

from memopt.runtime.memory_format import suggested_format


@dataclass(slots=True)
class _Sum:
    tensor: torch.Tensor
    owned: bool  # this backward may write to it
    contributions: int
    base: int  # identifies the buffer that it is a slice of
    start: int  # first channel in that buffer


class GradientSums:
    """Gradients of the numbered values of one region, during one backward.

    Args:
        dtypes: of each value. A concat of several dtypes has the widest; each part's gradient is cast back before it
            is added to others, as eager's is.
    """

    def __init__(self, dtypes: dict[int, torch.dtype]) -> None:
        self._dtypes = dtypes
        self._sums: dict[int, _Sum] = {}
        self._buffers = 0

    def add(self, number: int, grad: torch.Tensor, owned: bool) -> None:
        """Add a contribution to a value. `owned`: nobody else holds `grad`, it may be written to."""
        before = self._sums.get(number)
        if before is None:
            self._buffers += 1
            self._sums[number] = _Sum(grad, owned, 1, self._buffers, 0)
        else:
            self._accumulate(number, before, grad)

    def take(self, number: int) -> tuple[torch.Tensor, bool] | None:
        """The finished sum of a value, removed; with it, whether the taker may write to it.

        A sum of several contributions is handed out dense, as eager's would be; a single slice of a concat's gradient
        stays the slice that eager's would be.
        """
        total = self._sums.pop(number, None)
        if total is None:
            return None
        if total.contributions > 1:
            return total.tensor.contiguous(memory_format=suggested_format(total.tensor)), total.owned
        return total.tensor, total.owned

    def compact(self, number: int) -> torch.Tensor | None:
        """The finished sum of a value, to be handed out of the region.

        A sum of several contributions is dense, as eager's is, and holds no more memory than its own. A single slice
        stays one, as in eager: reductions over it run in the order of its strides.
        """
        total = self._sums.pop(number, None)
        if total is None:
            return None
        whole = total.tensor.untyped_storage().nbytes()
        if total.contributions > 1 and total.tensor.numel() * total.tensor.element_size() < whole:
            return total.tensor.clone(memory_format=torch.preserve_format)
        return total.tensor

    def split(
        self,
        grad: torch.Tensor,
        owned: bool,
        parts: tuple[int, ...],
        widths: tuple[int, ...],
        requires_grad: set[int],
    ) -> None:
        """Hand the gradient of a concat along dimension 1 to its parts, `widths` channels each, in order."""
        # One buffer for the parts to share, unless its slices would not lie as eager's do (an expanded gradient).
        if not owned and len(parts) > 1 and torch.ops.aten.is_non_overlapping_and_dense(grad):
            grad, owned = grad.clone(memory_format=torch.preserve_format), True
        self._buffers += 1
        base, start = self._buffers, 0
        run: list[tuple[_Sum, int, int]] = []  # parts that lie side by side here and in the buffer they add to
        for number, width in zip(parts, widths, strict=True):
            if number in requires_grad and width:
                before = self._sums.get(number)
                if self._dtypes[number] != grad.dtype:
                    self.add(number, grad.narrow(1, start, width).to(self._dtypes[number]), owned=True)
                elif before is None:
                    self._sums[number] = _Sum(grad.narrow(1, start, width), owned, 1, base, start)
                elif not before.owned:
                    self._accumulate(number, before, grad.narrow(1, start, width))
                else:
                    if run and not _adjacent(run[-1], before, start):
                        _add_run(run, grad)
                        run = []
                    run.append((before, start, width))
            start += width
        if run:
            _add_run(run, grad)

    def _accumulate(self, number: int, before: _Sum, grad: torch.Tensor) -> None:
        if before.owned and before.tensor.dtype == grad.dtype:
            before.tensor.add_(grad)
            before.contributions += 1
            return
        self._buffers += 1
        self._sums[number] = _Sum(before.tensor + grad, True, before.contributions + 1, self._buffers, 0)


def _adjacent(last: tuple[_Sum, int, int], following: _Sum, start: int) -> bool:
    total, last_start, width = last
    return following.base == total.base and following.start == total.start + width and start == last_start + width


def _add_run(run: list[tuple[_Sum, int, int]], grad: torch.Tensor) -> None:
    """One addition for neighbouring slices: the same elementwise sums in fewer kernels."""
    first, start, _ = run[0]
    total = sum(extent for _, _, extent in run)
    target = first.tensor
    if len(run) > 1:
        size = list(target.shape)
        size[1] = total
        target = target.as_strided(size, target.stride(), target.storage_offset())
    target.add_(grad.narrow(1, start, total))
    for part, _, _ in run:
        part.contributions += 1

"""Running statistics of all norms of a region, updated together: two kernels instead of two a norm."""

import torch

from memopt.runtime.ops.batch_norm import BatchNorm

_Entry = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class RunningStatistics:
    """Collects what each norm has seen, and adds it to its buffers once."""

    def __init__(self) -> None:
        self._groups: dict[tuple[float, int, torch.dtype, int], list[_Entry]] = {}
        self._uses: dict[int, int] = {}

    def add(self, op: BatchNorm, mean: torch.Tensor, variance: torch.Tensor, count: int) -> None:
        """A norm has normalised `count` positions of mean and (biased) variance, (C) each."""
        running_mean, running_var = op.running
        if running_mean is None or running_var is None:
            return
        # A norm that runs at several places updates its buffers several times, one after another.
        turn = self._uses[id(running_mean)] = self._uses.get(id(running_mean), -1) + 1
        key = (op.momentum, count, running_mean.dtype, turn)
        self._groups.setdefault(key, []).append((running_mean, running_var, mean, variance))

    def update(self) -> None:
        """Move every buffer by its norm's momentum."""
        for (momentum, count, dtype, _), entries in sorted(self._groups.items(), key=lambda group: group[0][3]):
            running_means, running_vars, means, variances = map(list, zip(*entries, strict=True))
            unbiased = torch._foreach_mul(variances, count / (count - 1))
            torch._foreach_lerp_(running_means, [mean.to(dtype) for mean in means], momentum)
            torch._foreach_lerp_(running_vars, [variance.to(dtype) for variance in unbiased], momentum)

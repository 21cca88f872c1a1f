"""SyncBatchNorm on a CPU: stand-ins for the kernels that ATen has for GPUs alone, and a count of collectives.

Eager's own Python runs on them, with its collectives, so that what is compared is the order of the calls and of the
sums, not the kernels.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import distributed
from torch.nn.modules import batchnorm
from torch.nn.parallel import DistributedDataParallel

_Pair = tuple[torch.Tensor, torch.Tensor]


def _per_channel(vector: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return vector.view(1, -1, *[1] * (like.dim() - 2))


def _others(x: torch.Tensor) -> list[int]:
    return [d for d in range(x.dim()) if d != 1]


def batch_norm_stats(x: torch.Tensor, eps: float) -> _Pair:
    wide = x.float()
    return wide.mean(_others(x)), (wide.var(_others(x), correction=0) + eps).rsqrt()


def batch_norm_gather_stats_with_counts(
    x: torch.Tensor,
    means: torch.Tensor,
    invstds: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    momentum: float,
    eps: float,
    counts: torch.Tensor,
) -> _Pair:
    share = (counts / counts.sum()).view(-1, 1)
    mean = (means * share).sum(0)
    var = ((invstds.pow(-2) - eps + (means - mean).square()) * share).sum(0)
    if running_mean is not None and running_var is not None:
        total = float(counts.sum())
        running_mean.lerp_(mean.to(running_mean), momentum)
        running_var.lerp_((var * total / (total - 1)).to(running_var), momentum)
    return mean, (var + eps).rsqrt()


def batch_norm_elemt(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    invstd: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    y = (x - _per_channel(mean, x)) * _per_channel(invstd, x)
    y = y if weight is None else y * _per_channel(weight, x)
    return (y if bias is None else y + _per_channel(bias, x)).to(x.dtype)


def batch_norm_backward_reduce(
    grad: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    invstd: torch.Tensor,
    weight: torch.Tensor | None,
    input_g: bool,
    weight_g: bool,
    bias_g: bool,
) -> tuple[torch.Tensor, ...]:
    sum_dy = grad.sum(_others(x))
    sum_dy_xmu = (grad * (x - _per_channel(mean, x))).sum(_others(x))
    return sum_dy, sum_dy_xmu, sum_dy_xmu * invstd, sum_dy.clone()


def batch_norm_backward_elemt(
    grad: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    invstd: torch.Tensor,
    weight: torch.Tensor | None,
    sum_dy: torch.Tensor,
    sum_dy_xmu: torch.Tensor,
    count: torch.Tensor,
) -> torch.Tensor:
    total = float(count.sum())
    centred = (x - _per_channel(mean, x)) * _per_channel(invstd.square() * sum_dy_xmu / total, x)
    scale = invstd if weight is None else invstd * weight
    return (grad - _per_channel(sum_dy / total, x) - centred) * _per_channel(scale, x)


_KERNELS = (
    batch_norm_stats, batch_norm_gather_stats_with_counts, batch_norm_elemt, batch_norm_backward_reduce,
    batch_norm_backward_elemt,
)  # fmt: skip


@cache
def allow_on_cpu() -> list[Any]:
    """From now on this process lets SyncBatchNorm run on CPU tensors."""
    library = torch.library.Library("aten", "IMPL", "CPU")
    for kernel in _KERNELS:
        library.impl(kernel.__name__, kernel)
    plain = torch._C._get_privateuse1_backend_name

    def backend_name() -> str:
        """SyncBatchNorm lets the device of a private backend through: tell it alone that this is the CPU."""
        return "cpu" if sys._getframe(1).f_globals["__name__"] == batchnorm.__name__ else plain()

    torch._C._get_privateuse1_backend_name = backend_name
    DistributedDataParallel._passing_sync_batchnorm_handle = lambda *_: None  # it wants a GPU as well
    return [library]


@contextmanager
def collectives(names: list[str]) -> Iterator[None]:
    """Note the name and the size of every collective that is called."""
    plain = {name: getattr(distributed, name) for name in ("all_gather", "all_reduce")}

    def noting(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensor = args[1] if name == "all_gather" else args[0]
            names.append(f"{name} of {tensor.numel()}")
            return plain[name](*args, **kwargs)

        return call

    for name in plain:
        setattr(distributed, name, noting(name))
    try:
        yield
    finally:
        for name, function in plain.items():
            setattr(distributed, name, function)

"""Batch normalisation over all processes of a group: the one function by which every stage knows it."""

from typing import Any

import torch
from torch import distributed, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import _functions
from torch.overrides import handle_torch_function, has_torch_function_unary

from memopt.ir.sharded import is_fully_sharded


def synchronised_batch_norm(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    """What `nn.SyncBatchNorm` computes where it synchronises, by eager's own function, in a form that a graph can hold.

    Args:
        x: (N, C, *spatial).
        arguments: weight and bias (C,), running mean and variance (C,), eps, momentum, process group, world size.

    Tensors without data have nobody to talk to: they get a result of the same kind and no collective runs.
    """
    if has_torch_function_unary(x):
        recorded: torch.Tensor = handle_torch_function(synchronised_batch_norm, (x,), x, *arguments)
        return recorded
    if isinstance(x, FakeTensor):
        return _like_the_result(x, *arguments[:2])
    y: torch.Tensor = _functions.SyncBatchNorm.apply(x, *arguments)  # type: ignore[no-untyped-call]
    return y


def _like_the_result(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.batch_norm(dense(x), weight, bias, None, None, True, 0.0, 1.0, torch.backends.cudnn.enabled)


def dense(x: torch.Tensor) -> torch.Tensor:
    """`x` as `nn.SyncBatchNorm` reads it: channels-last if it lies so, else contiguous."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    last = formats.get(x.dim())
    return x if last is not None and x.is_contiguous(memory_format=last) else x.contiguous()


def group_of(norm: nn.SyncBatchNorm) -> "distributed.ProcessGroup | None":
    """The processes that share a norm's statistics in its present mode; None where it acts on its own."""
    if not norm.training or not (distributed.is_available() and distributed.is_initialized()):
        return None
    group = norm.process_group or distributed.group.WORLD
    return group if distributed.get_world_size(group) > 1 else None


def waits_for_others(root: nn.Module) -> str | None:
    """What in a model makes a training step wait for other processes, if anything does."""
    if any(isinstance(m, nn.SyncBatchNorm) and group_of(m) is not None for m in root.modules()):
        return "SyncBatchNorm"
    return "FSDP2" if any(map(is_fully_sharded, root.modules())) else None

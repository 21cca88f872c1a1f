"""Batch normalisation with the statistics of all processes, by eager's own function.

Forward gathers every process's statistics once and keeps the joint mean and invstd (two vectors of C) and the counts.
Recompute normalises with them by the same elementwise kernel: no second collective, no second change of the running
statistics. Backward reduces its two sums as eager does, at the same place in the order of collectives, since steps are
walked in the order in which autograd would run them.
"""

from typing import Any

import torch
from torch import distributed, nn
from torch.nn.modules import _functions

from memopt.ir import dense, group_of
from memopt.runtime.ops.base import Bound, Params, Stash

_eager: Any = _functions.SyncBatchNorm


class _Context:
    """Stands for autograd's context in a call of eager's function."""

    saved_tensors: tuple[torch.Tensor | None, ...] = ()
    process_group: "distributed.ProcessGroup | None" = None
    needs_input_grad: tuple[bool, ...] = ()

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None:
        self.saved_tensors = tensors


class SyncBatchNorm:
    """batch_norm(x) with batch statistics over a process group."""

    def __init__(
        self,
        momentum: float,
        eps: float,
        running: tuple[torch.Tensor | None, torch.Tensor | None],
        group: "distributed.ProcessGroup",
    ) -> None:
        self.momentum = momentum
        self.eps = eps
        self.running = running
        self._group = group

    def forward(self, x: torch.Tensor, params: Params, out: torch.Tensor | None) -> tuple[torch.Tensor, Stash]:
        weight, bias = params
        running, self.running = self.running, (None, None)
        context = _Context()
        y: torch.Tensor = _eager.forward(
            context,
            x,
            weight,
            bias,
            *running,
            self.eps,
            self.momentum,
            self._group,
            distributed.get_world_size(self._group),
        )
        mean, invstd, counts = context.saved_tensors[2:]
        assert mean is not None
        assert invstd is not None
        assert counts is not None
        return y, (mean, invstd, counts)

    def recompute(self, x: torch.Tensor, params: Params, stash: Stash, out: torch.Tensor | None) -> torch.Tensor:
        weight, bias = params
        mean, invstd, _ = stash
        weight = None if weight is None else weight.contiguous()
        y: torch.Tensor = torch.batch_norm_elemt(dense(x), weight, bias, mean, invstd, self.eps)
        return y

    def backward(
        self,
        grad: torch.Tensor,
        x: torch.Tensor | None,
        y: torch.Tensor | None,
        params: Params,
        stash: Stash,
        needs: tuple[bool, ...],
        grad_owned: bool,
    ) -> tuple[torch.Tensor | None, ...]:
        assert x is not None
        weight = params[0]
        context = _Context()
        context.save_for_backward(dense(x), None if weight is None else weight.contiguous(), *stash)
        context.process_group = self._group
        context.needs_input_grad = needs
        gradients: tuple[torch.Tensor | None, ...] = _eager.backward(context, grad)
        if not x.numel():  # eager's engine goes on with zeros, so that the norms before this one meet the others too
            return (torch.zeros_like(x), None, None)
        return gradients[:3]


def bind_module(norm: nn.SyncBatchNorm) -> Bound:
    """As `SyncBatchNorm.forward` reads a module that synchronises; the counter is advanced when the forward runs."""
    group = group_of(norm)
    assert group is not None
    tracks = norm.track_running_stats
    running = (norm.running_mean, norm.running_var) if tracks else (None, None)
    op = SyncBatchNorm(norm.momentum or 0.0, norm.eps, running, group)
    counter = norm.num_batches_tracked if tracks else None
    if counter is None or norm.momentum is not None:
        return Bound(op, (norm.weight, norm.bias), counter)

    def average_cumulatively() -> None:
        op.momentum = 1.0 / float(counter)

    return Bound(op, (norm.weight, norm.bias), counter, average_cumulatively)


def bind_function(
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    eps: float,
    momentum: float,
    group: "distributed.ProcessGroup",
    _: Any,
) -> Bound:
    """As `synchronised_batch_norm` takes its arguments; the last is the world size."""
    return Bound(SyncBatchNorm(momentum, eps, (running_mean, running_var), group), (weight, bias))

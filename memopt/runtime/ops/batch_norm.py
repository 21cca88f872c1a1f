"""Batch normalisation by the very kernels eager uses.

Forward keeps mean and invstd (two vectors of C). Recompute calls the same kernel without running buffers, so the
same backend computes the same statistics of the same input: the result is bit-identical and the running
statistics change once. Normalising with the saved vectors would be cheaper but not bit-identical.
"""

from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from memopt.runtime.memory_format import has_odd_strides, suggested_format
from memopt.runtime.ops.base import Bound, Params, Stash

_aten = torch.ops.aten


class BatchNorm:
    """batch_norm(x) with batch statistics (`training`) or with the running ones."""

    def __init__(
        self,
        training: bool,
        momentum: float,
        eps: float,
        running_mean: torch.Tensor | None,
        running_var: torch.Tensor | None,
    ) -> None:
        self.training = training
        self.eps = eps
        self.momentum = momentum
        self.running = (running_mean, running_var)
        self._cudnn = False
        self._widened_by_running = False

    def forward(self, x: torch.Tensor, params: Params, out: torch.Tensor | None) -> tuple[torch.Tensor, Stash]:
        weight, bias = params
        running_mean, running_var = self.running
        self.running = (None, None)  # what backward needs of them is in the stash
        self._cudnn = _uses_cudnn(x, weight, bias, running_mean is not None, self.training, self.eps)
        # Without an affine part, the running buffers' dtype is what tells the kernel to keep its statistics wide.
        self._widened_by_running = weight is None and running_mean is not None and running_mean.dtype != x.dtype
        if self.training:
            return self._batch_statistics(x, weight, bias, running_mean, running_var, out)
        assert running_mean is not None and running_var is not None
        # The buffers may change before backward; eager saves the values this forward used.
        stash = (running_mean.clone(), running_var.clone())
        return self._running_statistics(x, weight, bias, stash), stash

    def recompute(self, x: torch.Tensor, params: Params, stash: Stash, out: torch.Tensor | None) -> torch.Tensor:
        weight, bias = params
        if not self.training:
            return self._running_statistics(x, weight, bias, stash)
        mean, var = (torch.zeros_like(stash[0]) if self._widened_by_running else None for _ in range(2))
        return self._batch_statistics(x, weight, bias, mean, var, out)[0]

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
        if self.training and self._cudnn:
            grad = grad.contiguous(memory_format=suggested_format(x))
            mean, invstd, reserve = stash
            result: tuple[torch.Tensor | None, ...] = _aten.cudnn_batch_norm_backward(
                x, grad, weight, None, None, mean, invstd, self.eps, reserve
            )
            return tuple(g if need else None for g, need in zip(result, needs, strict=True))
        if self.training:
            statistics: tuple[torch.Tensor | None, ...] = (None, None, stash[0], stash[1])
        else:
            empty = stash[0].new_empty(0)  # eager's kernel saves nothing in this mode; it must be a tensor all the same
            statistics = (stash[0], stash[1], empty, empty)
        return tuple(_aten.native_batch_norm_backward(grad, x, weight, *statistics, self.training, self.eps, needs))

    def _batch_statistics(
        self,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        running_mean: torch.Tensor | None,
        running_var: torch.Tensor | None,
        out: torch.Tensor | None,
    ) -> tuple[torch.Tensor, Stash]:
        arguments: tuple[Any, ...] = (x, weight, bias, running_mean, running_var, True, self.momentum, self.eps)
        if has_odd_strides(x) or not x.is_contiguous(memory_format=suggested_format(x)):
            # Each kernel has its own idea of how its result lies then, and native_batch_norm.out computes other
            # statistics of a slice than native_batch_norm does (seen in torch 2.13).
            out = None
        if self._cudnn:
            # Torch 2.11's cudnn_batch_norm.out swaps the tensor it was given as `reserve` for another. Called through
            # the unboxed binding that is harmless; boxed (torch.ops.aten, or any dispatch mode) it corrupts Python's
            # reference to it.
            if out is None or torch._C._len_torch_dispatch_stack() > 0:
                result = _aten.cudnn_batch_norm(*arguments)
            else:
                assert weight is not None  # else another kernel runs
                mean, invstd = (x.new_empty(x.shape[1], dtype=weight.dtype) for _ in range(2))
                reserve = x.new_empty(0, dtype=torch.uint8)
                result = torch.cudnn_batch_norm(*arguments, out=(out, mean, invstd, reserve))
            return result[0], tuple(result[1:])
        if out is None:
            result = _aten.native_batch_norm(*arguments)
        else:
            dtype = _statistics_dtype(x, weight, bias, running_mean)
            mean, invstd = (x.new_empty(x.shape[1], dtype=dtype) for _ in range(2))
            result = torch.native_batch_norm(*arguments, out=(out, mean, invstd))
        return result[0], tuple(result[1:])

    def _running_statistics(
        self, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, stash: Stash
    ) -> torch.Tensor:
        mean, var = stash
        y: torch.Tensor = torch.batch_norm(
            x, weight, bias, mean, var, False, 0.0, self.eps, torch.backends.cudnn.enabled
        )
        return y


_CUDNN = 1  # the index by which ATen names its cuDNN implementation
_backends: dict[tuple[Any, ...], bool] = {}


def _uses_cudnn(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    has_running: bool,
    training: bool,
    eps: float,
) -> bool:
    """Whether eager would choose cuDNN for batch normalisation of a tensor like `x`.

    Asked of eager itself, once per kind of tensor, on a small one with the same batch, dtype and layout: the rules
    are ATen's own and change between versions.
    """
    if not x.is_cuda or weight is None or bias is None or isinstance(x, FakeTensor):
        return False
    memory_format = suggested_format(x)
    enabled = torch.backends.cudnn.enabled
    key = (x.device, x.dtype, weight.dtype, x.dim(), x.shape[0], memory_format, has_running, training, eps, enabled)
    if key not in _backends:
        size = (x.shape[0], 2, *[2] * (x.dim() - 2))
        like = torch.ones(size, device=x.device, dtype=x.dtype).contiguous(memory_format=memory_format)
        vector = torch.ones(2, device=x.device, dtype=weight.dtype)
        running = torch.ones_like(vector) if has_running else None
        choice = torch._batch_norm_impl_index(like, vector, vector, running, running, training, 0.0, eps, enabled)
        _backends[key] = choice[-1] == _CUDNN
    return _backends[key]


def _statistics_dtype(x: torch.Tensor, *parameters: torch.Tensor | None) -> torch.dtype:
    """The dtype in which the native kernel hands out mean and invstd."""
    if x.is_cuda:
        return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    return next((p.dtype for p in parameters if p is not None), x.dtype)


def bind_module(norm: nn.modules.batchnorm._BatchNorm) -> Bound:
    """As `_BatchNorm.forward` reads the module; the batch counter is advanced when the forward runs."""
    update = norm.training and norm.track_running_stats
    momentum = 0.0 if norm.momentum is None else norm.momentum
    use_batch = norm.training or (norm.running_mean is None and norm.running_var is None)
    keep_running = not norm.training or norm.track_running_stats
    op = BatchNorm(
        use_batch,
        momentum,
        norm.eps,
        norm.running_mean if keep_running else None,
        norm.running_var if keep_running else None,
    )
    counter = norm.num_batches_tracked
    if not update or counter is None:
        return Bound(op, (norm.weight, norm.bias))
    if norm.momentum is not None:
        return Bound(op, (norm.weight, norm.bias), counter)

    def average_cumulatively() -> None:
        op.momentum = 1.0 / float(counter)

    return Bound(op, (norm.weight, norm.bias), counter, average_cumulatively)


def bind_function(
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    **_: Any,
) -> Bound:
    """As `torch.nn.functional.batch_norm` reads its arguments."""
    return Bound(BatchNorm(training, momentum, eps, running_mean, running_var), (weight, bias))

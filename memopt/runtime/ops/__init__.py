"""The operations a region can run, one class each, and how a graph node is bound to one."""

from typing import Any

import torch
import torch.nn.functional as F

from memopt.ir import Kind, Operand, OpSpec
from memopt.runtime.ops import batch_norm, convolution, elementwise, pure, sync_batch_norm
from memopt.runtime.ops.base import Bound, Operation, Params, Stash
from memopt.runtime.ops.joint import as_joint, bind_joint

_MODULE_BINDERS: dict[Kind, Any] = {
    Kind.BATCH_NORM: batch_norm.bind_module,
    Kind.SYNC_BATCH_NORM: sync_batch_norm.bind_module,
    Kind.RELU: elementwise.bind_relu_module,
    Kind.CONVOLUTION: convolution.bind_module,
    Kind.DROPOUT: elementwise.bind_dropout_module,
    Kind.AVG_POOL: elementwise.bind_pool_module,
    Kind.PURE: pure.bind_module,
}


def bind(spec: OpSpec, operands: tuple[Any, ...]) -> Bound:
    """The operation for one node.

    Args:
        spec: how the node runs.
        operands: the live module alone, or the tensors of a function call besides its input.
    """
    if spec.from_module:
        (module,) = operands
        bound: Bound = _MODULE_BINDERS[spec.kind](module)
        return bound
    if spec.kind is Kind.JOINT:
        return bind_joint(spec.target, spec.args, spec.kwargs, operands)
    if spec.kind is Kind.PURE:
        return pure.bind_function(spec.target, spec.args, spec.kwargs, operands)
    args = [operands[a.index] if isinstance(a, Operand) else a for a in spec.args]
    kwargs = {k: operands[a.index] if isinstance(a, Operand) else a for k, a in spec.kwargs.items()}
    return _bind_function(spec, args, kwargs)


def _bind_function(spec: OpSpec, args: list[Any], kwargs: dict[str, Any]) -> Bound:
    if spec.kind is Kind.RELU:
        return elementwise.bind_relu_function(spec.target, *args, **kwargs)
    if spec.kind is Kind.BATCH_NORM:
        return batch_norm.bind_function(*args, **kwargs)
    if spec.kind is Kind.SYNC_BATCH_NORM:
        return sync_batch_norm.bind_function(*args)
    if spec.kind is Kind.CONVOLUTION:
        return convolution.bind_function(*args, **kwargs)
    if spec.kind is Kind.DROPOUT:
        return elementwise.bind_dropout_function(spec.target, *args, **kwargs)
    dimensions = 2 if spec.target in (F.avg_pool2d, torch._C._nn.avg_pool2d) else 3
    return elementwise.bind_pool_function(dimensions, *args, **kwargs)


__all__ = ["Bound", "Operation", "Params", "Stash", "as_joint", "bind"]

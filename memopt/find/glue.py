"""Operations that no chain is made of, but that may stand between its parts: gates, sums, views, matrix products.

A region can run any call that always computes the same from its inputs, writes nowhere and draws no random numbers.
"""

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.node import map_arg

from memopt.ir import Kind, Operand, OpSpec, Role, has_hooks

_BY_GRADIENTS = frozenset(
    (torch.matmul, torch.einsum, torch.tensordot, F.bilinear, F.scaled_dot_product_attention, "matmul", "__matmul__")
) | {operator.matmul, torch.Tensor.matmul}
"""Calls for which ATen chooses other kernels where no gradients are recorded, as they are not inside a region."""
_MODULES = (nn.Linear, nn.Flatten, nn.Unflatten, nn.ChannelShuffle, nn.Softmax)


def glue_spec(node: fx.Node, root: nn.Module) -> OpSpec | None:
    """How a region would run a call of no other kind; None where it cannot."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or not _is_repeatable(node):
        return None
    if node.op == "call_module":
        assert isinstance(node.target, str)
        module = root.get_submodule(node.target)
        fits = type(module) in _MODULES and not has_hooks(module) and len(node.all_input_nodes) == 1
        is_linear = isinstance(module, nn.Linear)
        if not fits or (is_linear and (node.meta["autocast"] or value.dim() != 2)):
            return None
        return OpSpec(Kind.PURE, Role.GLUE, from_module=True, aliases=_aliases(node))
    inputs, operands = input_nodes(node), state_nodes(node)
    if not inputs or not all(isinstance(n.meta.get("val"), torch.Tensor) for n in inputs):
        return None
    if operands and node.meta["autocast"]:
        return None  # autocast's casts of parameters are shared with other readers
    if not value.requires_grad and any(n.meta["val"].requires_grad for n in (*inputs, *operands)):
        return None  # it cuts the gradient off
    if node.target in _BY_GRADIENTS or (node.target is F.linear and value.dim() != 2):
        return None
    return _spec(node)


def hands_on_elements(node: fx.Node, spec: OpSpec, root: nn.Module) -> bool:
    """Whether an operation changes or rearranges the elements of a tensor, instead of mixing or averaging them."""
    if spec.role not in (Role.GLUE, Role.DROPOUT, Role.ACTIVATION) or node.target is F.linear:
        return False
    if node.op == "call_module" and isinstance(root.get_submodule(str(node.target)), nn.Linear):
        return False
    largest = max(n.meta["val"].numel() for n in input_nodes(node))
    return bool(2 * node.meta["val"].numel() >= largest)


def _is_repeatable(node: fx.Node) -> bool:
    return (
        node.op in ("call_function", "call_method", "call_module")
        and not node.meta.get("random", True)
        and not node.meta.get("writes", True)
        and bool(node.meta.get("reads_once"))
    )


def _spec(node: fx.Node) -> OpSpec:
    """Each time that a tensor is read is an input of its own, with a gradient of its own."""
    reads, count = 0, len(input_nodes(node))
    places = {operand: Operand(count + index) for index, operand in enumerate(state_nodes(node))}

    def place(argument: fx.Node) -> Any:
        nonlocal reads
        if argument in places:
            return places[argument]
        reads += 1
        return Operand(reads - 1)

    args: Any = map_arg(node.args, place)
    kwargs: Any = map_arg(node.kwargs, place)
    return OpSpec(
        Kind.JOINT, Role.GLUE, from_module=False, target=node.target, args=args, kwargs=kwargs, aliases=_aliases(node)
    )


def input_nodes(node: fx.Node) -> list[fx.Node]:
    """The computed tensors that a call reads, once for each time, in order."""
    return [n for n in _occurrences(node) if n.op != "get_attr"]


def state_nodes(node: fx.Node) -> list[fx.Node]:
    """The parameters and buffers that a call reads, each once."""
    return list(dict.fromkeys(n for n in _occurrences(node) if n.op == "get_attr"))


def _occurrences(node: fx.Node) -> list[fx.Node]:
    found: list[fx.Node] = []
    map_arg((node.args, node.kwargs), found.append)
    return found


def _aliases(node: fx.Node) -> bool:
    storage = node.meta["val"].untyped_storage()._cdata
    values = (n.meta.get("val") for n in node.all_input_nodes)
    return any(isinstance(v, torch.Tensor) and v.untyped_storage()._cdata == storage for v in values)

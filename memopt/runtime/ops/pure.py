"""Any other deterministic function of one tensor: autograd itself differentiates it, on the recomputed input.

One general rule instead of a formula per activation, norm and pooling. It runs the user's own function, so its bits
are eager's by construction; the price is that what autograd saves for this one operation exists during its backward.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from memopt.ir import Operand
from memopt.runtime.autocast import cast_parameter
from memopt.runtime.ops.base import Bound, Params, Stash


class Pure:
    """function(x, *params)."""

    def __init__(self, function: Callable[..., torch.Tensor], overwrites_input: bool) -> None:
        self._function = function
        self._overwrites_input = overwrites_input
        self._autocast: tuple[str, torch.dtype, bool] = ("cpu", torch.bfloat16, False)

    def forward(self, x: torch.Tensor, params: Params, out: torch.Tensor | None) -> tuple[torch.Tensor, Stash]:
        device = x.device.type
        self._autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        return self._run(x, params), ()

    def recompute(self, x: torch.Tensor, params: Params, stash: Stash, out: torch.Tensor | None) -> torch.Tensor:
        return self._run(x, params)

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
        with torch.enable_grad():
            leaves = [
                None if t is None else t.detach().requires_grad_(need)
                for t, need in zip((x, *params), needs, strict=True)
            ]
            first = leaves[0]
            assert first is not None
            result = self._run(first, tuple(leaves[1:]))
        wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
        gradients = iter(torch.autograd.grad(result, wanted, grad))
        return tuple(next(gradients) if leaf is not None and leaf.requires_grad else None for leaf in leaves)

    def _run(self, x: torch.Tensor, params: Params) -> torch.Tensor:
        device, dtype, enabled = self._autocast
        # The cache of casted weights must not be filled here: made without gradients, it would cut off eager's.
        with torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False):
            # An in-place function has its own gradient formula: run it as it is, on a copy.
            return self._function(x.clone() if self._overwrites_input else x, *params)


def bind_module(module: nn.Module) -> Bound:
    """A module without side effects: a norm without running statistics, an activation, a pooling."""
    overwrites = bool(getattr(module, "inplace", False))
    for kind, (names, call) in _WITH_PARAMETERS.items():
        if isinstance(module, kind):
            params = tuple(getattr(module, name) for name in names)
            if isinstance(module, (nn.modules.conv._ConvNd, nn.PReLU)):
                params = tuple(map(cast_parameter, params))
            return Bound(Pure(partial(call, module), overwrites), params)
    return Bound(Pure(module.forward, overwrites), ())


def bind_function(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], operands: Params) -> Bound:
    """A function call whose tensors besides the input are `operands`."""

    def call(x: torch.Tensor, *params: torch.Tensor | None) -> torch.Tensor:
        def fill(value: Any) -> Any:
            return params[value.index] if isinstance(value, Operand) else copy.copy(value)

        function = getattr(torch.Tensor, target) if isinstance(target, str) else target
        result: torch.Tensor = function(x, *map(fill, args), **{key: fill(value) for key, value in kwargs.items()})
        return result

    if target in (torch.conv1d, torch.conv2d, torch.conv3d, torch.prelu, F.prelu):
        operands = tuple(map(cast_parameter, operands))
    overwrites = bool(kwargs.get("inplace", False)) or (isinstance(target, str) and target.endswith("_"))
    return Bound(Pure(call, overwrites), operands)


_Call = Callable[..., torch.Tensor]
_WITH_PARAMETERS: dict[Any, tuple[tuple[str, ...], _Call]] = {
    nn.GroupNorm: (("weight", "bias"), lambda m, x, w, b: F.group_norm(x, m.num_groups, w, b, m.eps)),
    nn.LayerNorm: (("weight", "bias"), lambda m, x, w, b: F.layer_norm(x, m.normalized_shape, w, b, m.eps)),
    nn.modules.instancenorm._InstanceNorm: (
        ("weight", "bias"),
        lambda m, x, w, b: F.instance_norm(x, None, None, w, b, True, m.momentum or 0.0, m.eps),
    ),
    nn.PReLU: (("weight",), lambda m, x, w: F.prelu(x, w)),
    nn.modules.conv._ConvNd: (("weight", "bias"), lambda m, x, w, b: m._conv_forward(x, w, b)),
    nn.Linear: (("weight", "bias"), lambda m, x, w, b: F.linear(x, w, b)),
}

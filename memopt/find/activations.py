"""Which pointwise function an activation is, where fused kernels know it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from memopt.ir import Activation

_PLAIN_MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
}
_PLAIN_FUNCTIONS: dict[Any, str] = {
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"), "relu"),
    F.relu6: "relu6",
    F.silu: "silu",
    F.hardswish: "hardswish",
    **dict.fromkeys((F.sigmoid, torch.sigmoid, "sigmoid"), "sigmoid"),
    **dict.fromkeys((F.tanh, torch.tanh, "tanh"), "tanh"),
}
_GELU = {"none": "gelu", "tanh": "gelu_tanh"}


def module_activation(module: nn.Module) -> Activation | None:
    """The activation that a module of torch's own applies."""
    if type(module) in _PLAIN_MODULES:
        return Activation(_PLAIN_MODULES[type(module)])
    if isinstance(module, nn.LeakyReLU):
        return Activation("leaky_relu", module.negative_slope)
    if isinstance(module, nn.ELU):
        return Activation("elu", module.alpha)
    if isinstance(module, nn.GELU):
        return Activation(_GELU[module.approximate])
    return None


def called_activation(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Activation | None:
    """The activation that a function, or a method of that name, applies. `args` are those after the input."""
    if function in _PLAIN_FUNCTIONS:
        return Activation(_PLAIN_FUNCTIONS[function])
    if function is F.leaky_relu:
        return Activation("leaky_relu", args[0] if args else kwargs.get("negative_slope", 0.01))
    if function is F.elu:
        return Activation("elu", args[0] if args else kwargs.get("alpha", 1.0))
    if function is F.gelu:
        return Activation(_GELU[kwargs.get("approximate", "none")])
    return None

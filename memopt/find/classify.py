"""What a graph node does: recognised by the function it runs, never by the name of the user's class."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from memopt.find.activations import called_activation, module_activation
from memopt.find.pooling import called_pool, module_pool
from memopt.ir import Kind, Operand, OpSpec, Role, group_of, has_hooks, synchronised_batch_norm

_BatchNorm = nn.modules.batchnorm._BatchNorm
_InstanceNorm = nn.modules.instancenorm._InstanceNorm

_ACTIVATION_MODULES = (
    nn.CELU, nn.ELU, nn.GELU, nn.GLU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU,
    nn.LogSigmoid, nn.Mish, nn.PReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softsign, nn.Tanh,
    nn.Tanhshrink, nn.Threshold,
)  # fmt: skip
_POOL_MODULES = (
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d,
    nn.AdaptiveMaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d,
)  # fmt: skip
_RELU_FUNCTIONS = (F.relu, F.relu_, torch.relu, torch.relu_)
_ACTIVATION_FUNCTIONS = (
    F.celu, F.elu, F.gelu, F.hardsigmoid, F.hardswish, F.hardtanh, F.leaky_relu, F.logsigmoid, F.mish, F.relu6, F.selu,
    F.sigmoid, F.silu, F.softplus, F.softsign, F.tanh, F.prelu, torch.sigmoid, torch.tanh, torch.selu, torch.prelu,
)  # fmt: skip
_POOL_FUNCTIONS = (
    F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, F.adaptive_max_pool2d, F.avg_pool1d,
    F.max_pool1d, F.max_pool2d, F.max_pool3d, torch.max_pool1d, torch.max_pool2d, torch.max_pool3d,
)  # fmt: skip
_CONV_FUNCTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)
_DROPOUT_FUNCTIONS = (F.dropout, F.dropout2d, F.dropout3d)
_NORM_FUNCTIONS = (F.group_norm, F.layer_norm)
_METHODS = {"relu": Kind.RELU, "relu_": Kind.RELU, "sigmoid": Kind.PURE, "tanh": Kind.PURE}
CONCAT_FUNCTIONS = (torch.cat, torch.concat, torch.concatenate, torch.hstack)


def classify(node: fx.Node, root: nn.Module) -> OpSpec | str | None:
    """How a region would run `node`: a spec, the reason why it cannot, or None where the question does not arise."""
    if node.op == "call_module":
        assert isinstance(node.target, str)
        return _classify_module(root.get_submodule(node.target))
    if node.op == "call_method":
        kind = _METHODS.get(str(node.target))
        return None if kind is None else _functional(node, kind, Role.ACTIVATION)
    if node.op == "call_function":
        return _classify_function(node)
    return None


def concat_parts(node: fx.Node) -> list[fx.Node] | str | None:
    """The tensors a channel concat is made of; the reason if it is a concat of another kind; None if it is none."""
    if node.op != "call_function" or node.target not in CONCAT_FUNCTIONS:
        return None
    parts = node.args[0] if node.args else node.kwargs.get("tensors")
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
    dim = 1 if node.target is torch.hstack else dim
    if "out" in node.kwargs:
        return "writes into a given tensor (out=)"
    rank = node.meta["val"].dim()
    if not isinstance(dim, int) or rank < 2 or dim % rank != 1:
        return f"concatenates dimension {dim}, not channels"
    if not isinstance(parts, (list, tuple)) or not all(isinstance(part, fx.Node) for part in parts):
        return "concatenates something other than a list of tensors"
    if any(part.meta["val"].dim() > 1 and not part.meta["val"].shape[1] for part in parts):
        return "concatenates a tensor without channels"
    return [part for part in parts if isinstance(part, fx.Node)]


def _classify_module(module: nn.Module) -> OpSpec | str | None:
    spec = _module_spec(module)
    if isinstance(spec, OpSpec) and has_hooks(module):
        return f"{type(module).__name__} has hooks, which recomputing would skip"
    return spec


def _module_spec(module: nn.Module) -> OpSpec | str | None:
    forward: Any = type(module).forward
    if isinstance(module, nn.SyncBatchNorm) and forward is nn.SyncBatchNorm.forward and group_of(module) is not None:
        return OpSpec(Kind.SYNC_BATCH_NORM, Role.NORM, from_module=True)
    if isinstance(module, _BatchNorm) and forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward):
        batch_statistics = module.training or module.running_mean is None
        return OpSpec(Kind.BATCH_NORM, Role.NORM, from_module=True, writes_out=batch_statistics)
    if isinstance(module, _InstanceNorm) and forward is _InstanceNorm.forward:
        if module.track_running_stats:
            return "InstanceNorm with running statistics is not supported"
        return OpSpec(Kind.PURE, Role.NORM, from_module=True)
    if type(module) in (nn.GroupNorm, nn.LayerNorm):
        return OpSpec(Kind.PURE, Role.NORM, from_module=True)
    if type(module) is nn.ReLU:
        return OpSpec(Kind.RELU, Role.ACTIVATION, from_module=True, activation=module_activation(module))
    if type(module) in _ACTIVATION_MODULES:
        return OpSpec(Kind.PURE, Role.ACTIVATION, from_module=True, activation=module_activation(module))
    if type(module) in (nn.Dropout, nn.Dropout2d, nn.Dropout3d):
        return OpSpec(Kind.DROPOUT, Role.DROPOUT, from_module=True)
    if type(module) in (nn.AvgPool2d, nn.AvgPool3d):
        return OpSpec(Kind.AVG_POOL, Role.POOL, from_module=True, pool=module_pool(module))
    if type(module) in _POOL_MODULES:
        if getattr(module, "return_indices", False):
            return "pooling that returns indices is not supported"
        return OpSpec(Kind.PURE, Role.POOL, from_module=True, pool=module_pool(module))
    return _convolution_spec(module)


def _convolution_spec(module: nn.Module) -> OpSpec | str | None:
    for plain in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        if isinstance(module, plain):
            if type(module).forward is not plain.forward or type(module)._conv_forward is not plain._conv_forward:
                return f"{type(module).__name__} overrides its convolution's forward"
            direct = module.padding_mode == "zeros" and _symmetric(module)
            kind = Kind.CONVOLUTION if direct else Kind.PURE
            return OpSpec(kind, Role.CONSUMER, from_module=True, window=_window(module) if direct else None)
    return None


def _symmetric(conv: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> bool:
    """Whether padding="same" pads both sides alike (else ATen pads in an operation of its own)."""
    sides = zip(conv.dilation, conv.kernel_size, strict=True)
    return conv.padding != "same" or all(d * (k - 1) % 2 == 0 for d, k in sides)


def _window(conv: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> tuple[int, ...] | None:
    """Kernel size of a convolution that keeps the size of its input."""
    return _same_size(conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)


def _same_size(
    window: tuple[int, ...], stride: Any, padding: Any, dilation: Any, groups: Any
) -> tuple[int, ...] | None:
    def each(setting: Any) -> tuple[Any, ...]:
        return (setting,) * len(window) if isinstance(setting, int) else tuple(setting)

    if {*each(stride), *each(dilation), groups} != {1} or any(n % 2 == 0 for n in window):
        return None
    if isinstance(padding, str):
        return window if padding == "same" or set(window) == {1} else None
    return window if each(padding) == tuple(n // 2 for n in window) else None


def _classify_function(node: fx.Node) -> OpSpec | str | None:
    target = node.target
    if target in _RELU_FUNCTIONS:
        return _functional(node, Kind.RELU, Role.ACTIVATION)
    if target is F.batch_norm:
        training = node.args[5] if len(node.args) > 5 else node.kwargs.get("training", False)
        return _functional(node, Kind.BATCH_NORM, Role.NORM, writes_out=bool(training))
    if target is synchronised_batch_norm:
        return _functional(node, Kind.SYNC_BATCH_NORM, Role.NORM)
    if target is F.instance_norm:
        if node.kwargs.get("running_mean", node.args[1] if len(node.args) > 1 else None) is not None:
            return "instance_norm with running statistics is not supported"
        return _functional(node, Kind.PURE, Role.NORM)
    if target in _CONV_FUNCTIONS:
        padding = node.args[4] if len(node.args) > 4 else node.kwargs.get("padding", 0)
        spec = _functional(node, Kind.PURE if isinstance(padding, str) else Kind.CONVOLUTION, Role.CONSUMER)
        return replace(spec, window=_called_window(node)) if isinstance(spec, OpSpec) else spec
    if target in (F.avg_pool2d, F.avg_pool3d):
        return _functional(node, Kind.AVG_POOL, Role.POOL)
    groups: tuple[tuple[tuple[Callable[..., Any], ...], Kind, Role], ...] = (
        (_NORM_FUNCTIONS, Kind.PURE, Role.NORM),
        (_ACTIVATION_FUNCTIONS, Kind.PURE, Role.ACTIVATION),
        (_DROPOUT_FUNCTIONS, Kind.DROPOUT, Role.DROPOUT),
        (_POOL_FUNCTIONS, Kind.PURE, Role.POOL),
    )
    for functions, kind, role in groups:
        if target in functions:
            return _functional(node, kind, role)
    return None


def _called_window(node: fx.Node) -> tuple[int, ...] | None:
    """The same of a call F.conv(x, weight, bias, stride, padding, dilation, groups)."""
    names = ("weight", "bias", "stride", "padding", "dilation", "groups")
    settings: dict[str, Any] = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    settings |= dict(zip(names, node.args[1:], strict=False)) | node.kwargs
    weight = settings.pop("weight", None)
    settings.pop("bias", None)
    if not isinstance(weight, fx.Node) or settings.keys() - set(names):
        return None
    return _same_size(tuple(weight.meta["val"].shape[2:]), **settings)


def _functional(node: fx.Node, kind: Kind, role: Role, writes_out: bool = False) -> OpSpec | str:
    """The spec of a call: its first argument is the input, other tensors are operands."""
    if not node.args or not isinstance(node.args[0], fx.Node):
        return f"{node.name} is not called with its input as first argument"
    if not isinstance(node.meta["val"], torch.Tensor) or "out" in node.kwargs:
        return f"{node.name} returns something other than one new tensor"
    operands = operand_nodes(node)
    places = {operand: Operand(index) for index, operand in enumerate(operands)}

    def place(value: Any) -> Any:
        return places[value] if isinstance(value, fx.Node) else value

    args = tuple(place(value) for value in node.args[1:])
    kwargs = {key: place(value) for key, value in node.kwargs.items()}
    return OpSpec(
        kind,
        role,
        from_module=False,
        target=node.target,
        args=args,
        kwargs=kwargs,
        writes_out=writes_out,
        activation=called_activation(node.target, node.args[1:], node.kwargs) if role is Role.ACTIVATION else None,
        pool=called_pool(node.target, node.args[1:], node.kwargs) if role is Role.POOL else None,
    )


def operand_nodes(node: fx.Node) -> list[fx.Node]:
    """The tensors of a call besides its input, each once, in order."""
    rest = (*node.args[1:], *node.kwargs.values())
    return list(dict.fromkeys(value for value in rest if isinstance(value, fx.Node)))

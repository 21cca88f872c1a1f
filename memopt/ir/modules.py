"""What the stages ask of a module."""

from torch import nn


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module runs more than its forward."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def has_own_forward(module: nn.Module) -> bool:
    """Whether a module can be called: lists and dictionaries of modules cannot."""
    return not isinstance(module, (nn.ModuleList, nn.ModuleDict)) and "_forward_unimplemented" not in (
        getattr(type(module).forward, "__name__", ""),
    )

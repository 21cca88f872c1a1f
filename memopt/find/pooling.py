"""Average poolings whose windows lie side by side: what fused kernels know."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import nn

_Window = tuple[int, ...]
_MODULES: dict[type[nn.Module], int] = {nn.AvgPool1d: 1, nn.AvgPool2d: 2, nn.AvgPool3d: 3}
_FUNCTIONS: dict[Callable[..., Any], int] = {F.avg_pool1d: 1, F.avg_pool2d: 2, F.avg_pool3d: 3}


def module_pool(module: nn.Module) -> _Window | None:
    """Window of a module that is one of them."""
    if type(module) not in _MODULES:
        return None
    pool: Any = module
    # Nothing is padded: what is counted beyond the edges does not matter.
    settings = (pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode, True)
    return _side_by_side(_MODULES[type(module)], *settings, getattr(pool, "divisor_override", None))


def called_pool(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Window | None:
    """The same of a call with these arguments after the input."""
    return _side_by_side(_FUNCTIONS[target], *args, **kwargs) if target in _FUNCTIONS else None


def _side_by_side(
    dimensions: int,
    kernel_size: int | _Window,
    stride: int | _Window | None = None,
    padding: int | _Window = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> _Window | None:
    def each(setting: int | _Window) -> _Window:
        sizes = (setting,) if isinstance(setting, int) else tuple(setting)
        return sizes * dimensions if len(sizes) == 1 else sizes

    window = each(kernel_size)
    apart = window if stride is None or stride == () else each(stride)
    direct = apart == window and not any(each(padding)) and divisor_override is None
    return window if direct else None

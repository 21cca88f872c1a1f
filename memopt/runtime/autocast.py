"""The casts of parameters that autocast makes, made outside of a region and shared with everybody else.

Note: [Autocast's cache]
Autocast casts a weight once per context: every reader, in this forward or in another one, gets the same cast tensor,
so that the readers' gradients are summed in the narrow dtype and cast back once. Casting inside the region would sum
wide values instead, and a cast made there without history would be found in the cache by code that needs one. The cache
has no interface, but an operation that saves its cast parameter for backward hands it out.
"""

from typing import Any

import torch


def cast_parameter(parameter: torch.Tensor | None) -> torch.Tensor | None:
    """What a convolution reads in place of its weight or bias: the cast that autocast's cache holds, or itself.

    Args:
        parameter: a weight (out, in, *kernel), a bias (out,) or None.
    """
    if parameter is None or not torch.is_autocast_enabled(parameter.device.type):
        return parameter
    dtype = torch.get_autocast_dtype(parameter.device.type)
    if parameter.dtype in (dtype, torch.float64):
        return parameter
    if not parameter.requires_grad:
        return parameter.to(dtype)
    with torch.autograd.graph.saved_tensors_hooks(_untouched, _untouched):
        if parameter.dim() == 1:
            x = parameter.new_empty((1, 0, 1), dtype=dtype)  # an empty batch: no arithmetic
            saved: Any = torch.conv_tbc(x, x.new_empty(1, 1, len(parameter)), parameter).grad_fn
            cast: torch.Tensor = saved._saved_bias
        else:
            convolve = (torch.conv1d, torch.conv2d, torch.conv3d)[parameter.dim() - 3]
            saved = convolve(parameter.new_empty((0, *parameter.shape[1:]), dtype=dtype), parameter).grad_fn
            cast = saved._saved_weight
    return cast


def _untouched(tensor: torch.Tensor) -> torch.Tensor:
    return tensor

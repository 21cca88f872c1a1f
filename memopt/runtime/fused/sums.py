"""What a pass over the positions leaves in parts, for `finish_norm` to add."""

from dataclasses import dataclass

import torch

from memopt.runtime.fused.call import Call, Norm, image_size
from memopt.runtime.kernels.norm_act_conv_weight import norm_act_conv_weight, parts_size


@dataclass(frozen=True, slots=True)
class Sums:
    """All of it for one norm.

    Attributes:
        norm: Σ d and Σ d·(x - mean), (2, C, parts).
        weight: parts of the gradient of a convolution's weight.
        step: of that convolution.
    """

    norm: torch.Tensor
    weight: torch.Tensor | None = None
    step: int | None = None


def empty_sums(count: int, channels: int, device: torch.device) -> torch.Tensor:
    """Room for `Sums.norm`."""
    return torch.empty(2, channels, count, dtype=torch.float32, device=device)


def weight_parts(
    call: Call, norm: Norm, g: torch.Tensor, x: torch.Tensor, size: tuple[int, ...], weight: torch.Tensor
) -> torch.Tensor:
    """`Sums.weight` of a wide convolution of act(norm(x)), x (P, C) an image of a size, g (P, K) its gradient."""
    parts = torch.empty(parts_size(len(x), x.shape[1], weight), dtype=torch.float32, device=x.device)
    norm_act_conv_weight(g, x, *norm.arguments, *image_size(size), call.allow_tf32, parts)
    return parts

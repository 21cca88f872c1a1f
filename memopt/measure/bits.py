"""Comparing tensors bit for bit, and by how much they differ."""

import math

import torch


def same_bits(first: torch.Tensor | None, second: torch.Tensor | None) -> bool:
    """Equal shape, dtype and bits: a NaN equals the same NaN, and 0.0 does not equal -0.0."""
    if first is None or second is None:
        return first is second
    if first.shape != second.shape or first.dtype != second.dtype or first.device != second.device:
        return False
    return torch.equal(_bits(first), _bits(second))


def relative_error(reference: torch.Tensor | None, candidate: torch.Tensor | None) -> float:
    """L2 norm of (candidate - reference) over reference's; 0.0 for equal bits, infinite if not finite."""
    if same_bits(reference, candidate):
        return 0.0
    if reference is None or candidate is None or reference.shape != candidate.shape:
        return math.inf
    wide = reference.double()
    error = (torch.linalg.vector_norm(candidate.double() - wide) / torch.linalg.vector_norm(wide)).item()
    return error if math.isfinite(error) else math.inf


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    dense = tensor.to_dense() if tensor.layout is not torch.strided else tensor
    return dense.detach().reshape(-1).contiguous().view(torch.uint8)

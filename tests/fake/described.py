"""All there is to know of a tensor without data."""

from typing import Any

import torch


def described(tensor: torch.Tensor) -> tuple[Any, ...]:
    return (
        type(tensor),
        tuple(tensor.shape),
        tensor.stride(),
        tensor.dtype,
        tensor.device,
        tensor.requires_grad,
        tensor.storage_offset(),
        tensor.untyped_storage().nbytes(),
        tensor._version,
    )

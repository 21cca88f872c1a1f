"""Images (N, C, *spatial) as matrices of positions × channels and back, and how both lie in memory."""

from math import prod

import torch

from memopt.runtime.kernels.tiles import padded
from memopt.runtime.memory_format import suggested_format


def rows_of(image: torch.Tensor) -> torch.Tensor:
    """The matrix (N · spatial, C) of an image; a view where the channels lie innermost, else a copy."""
    last = image.movedim(1, -1)
    return last.reshape(-1, image.shape[1])


def image_of(rows: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    """The image of a matrix, as a view. `size` is that of any image with the same batch and spatial sizes."""
    return rows.view(size[0], *size[2:], rows.shape[1]).movedim(-1, 1)


def laid_like(image: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A convolution's weight as cuDNN reads it beside an image: with the channels innermost if the image's are."""
    chosen = suggested_format(image)
    return weight if chosen == torch.contiguous_format else weight.contiguous(memory_format=chosen)


def empty_arena(positions: int, channels: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A new matrix of features. Its rows begin where kernels can load many channels at once."""
    return torch.empty(positions, padded(channels), dtype=dtype, device=device)[:, :channels]


def zero_arena(like: torch.Tensor) -> torch.Tensor:
    """Zeros of float32 that lie as another arena does."""
    positions, channels = like.shape
    return torch.zeros(positions, padded(channels), dtype=torch.float32, device=like.device)[:, :channels]


def empty_pair(channels: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Two new vectors of float32, such as a mean and a variance."""
    both = torch.empty(2, channels, dtype=torch.float32, device=device)
    return both[0], both[1]


def zero_pair(channels: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Two vectors of zeros."""
    both = torch.zeros(2, channels, dtype=torch.float32, device=device)
    return both[0], both[1]


def empty_averages(like: torch.Tensor, window: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A new matrix with a row for every window of an image, as wide as `like`."""
    return torch.empty(len(like) // prod(window), like.shape[1], dtype=dtype, device=like.device)


def empty_rows(like: torch.Tensor, channels: int, dtype: torch.dtype) -> torch.Tensor:
    """A new matrix with as many rows as `like`."""
    return torch.empty(len(like), channels, dtype=dtype, device=like.device)

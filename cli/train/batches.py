"""Batches in an order that depends on the seed and the epoch alone, augmented on the device they are trained on.

What an image looks like in an epoch does not depend on the number of processes, on workers, or on where training was
interrupted: random numbers are drawn for the whole batch, and each process takes its share.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from densenet_models.train import PADDING_LABEL, Batch, seed_of

from ..errors import CommandError
from .data import DataSet, Images

PADDING = 4
"""Pixels around an image of 32×32 within which it is moved; more around larger ones."""


@dataclass(frozen=True, slots=True)
class Share:
    """A process's share of each batch: the `rank`-th of `ranks` equal parts."""

    rank: int = 0
    ranks: int = 1

    def of(self, numbers: Sequence[int]) -> Sequence[int]:
        """Part of a batch whose size is a multiple of `ranks`."""
        size = len(numbers) // self.ranks
        return numbers[self.rank * size : (self.rank + 1) * size]


@dataclass(frozen=True, slots=True)
class Batches:
    """Makes batches of a data set.

    Attributes:
        data: mean and deviation of the colours, and whether images may be mirrored.
        size: images in a batch over all processes, a multiple of their number.
        share: this process's part.
        seed: of order and augmentation.
        augment: move and mirror training images.
        device: where batches are wanted.
        channels_last: memory format of the images.
        workers: processes that read images; 0 reads in this one.
    """

    data: DataSet
    size: int
    share: Share
    seed: int
    augment: bool
    device: torch.device
    channels_last: bool = False
    workers: int = 0

    def per_epoch(self, images: Images) -> int:
        """Batches of an epoch. What is left of the images is not used in it."""
        return len(images) // self.size

    def training(self, images: Images, epoch: int, first: int = 0) -> Iterator[Batch]:
        """An epoch's batches from number `first` on, each image at most once, in random order."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, epoch, "order"))
        order = torch.randperm(len(images), generator=generator).tolist()
        numbers = range(first, self.per_epoch(images))
        chosen = [self.share.of(order[n * self.size : (n + 1) * self.size]) for n in numbers]
        for number, (pixels, labels) in zip(numbers, _fetched(images, chosen, self.workers), strict=True):
            on_device = self._moved(pixels)
            if self.augment:
                on_device = self._augmented(on_device, epoch, number)
            yield self._normalised(on_device), self._moved(labels)

    def evaluation(self, images: Images) -> Iterator[Batch]:
        """All images once, in order; the last batch is filled up with images that count for nothing."""
        numbers = list(range(len(images)))
        filling = -len(numbers) % self.size
        numbers += [0] * filling
        labelled = [True] * len(images) + [False] * filling
        starts = range(0, len(numbers), self.size)
        chosen = [self.share.of(numbers[start : start + self.size]) for start in starts]
        counted = [self.share.of(labelled[start : start + self.size]) for start in starts]
        for counts, (pixels, labels) in zip(counted, _fetched(images, chosen, self.workers), strict=True):
            real = labels.masked_fill(~torch.tensor(counts), PADDING_LABEL)
            yield self._normalised(self._moved(pixels)), self._moved(real)

    def _moved(self, tensor: Tensor) -> Tensor:
        # From pinned memory, so that the processor need not wait for what the device still has to do.
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def _augmented(self, images: Tensor, epoch: int, number: int) -> Tensor:
        """Each image moved by some pixels, black where it left, and every other one mirrored where that is allowed."""
        margin = max(1, PADDING * self.data.size // 32)
        generator = torch.Generator().manual_seed(seed_of(self.seed, epoch, number, "augmentation"))
        moves = torch.randint(0, 2 * margin + 1, (self.size, 2), generator=generator)
        mirrored = torch.rand(self.size, generator=generator) < 0.5
        mine = self.share.of(range(self.size))
        chosen = slice(mine[0], mine[-1] + 1)
        flipped = mirrored[chosen] & self.data.flip
        return _crop(images, self._moved(moves[chosen]), self._moved(flipped), margin)

    def _normalised(self, images: Tensor) -> Tensor:
        shift, scale = _colours(self.data.mean, self.device), _colours(self.data.deviation, self.device)
        memory_format = torch.channels_last if self.channels_last else torch.contiguous_format
        return ((images - shift) / scale).contiguous(memory_format=memory_format)


@lru_cache
def _colours(values: tuple[float, float, float], device: torch.device) -> Tensor:
    """Values of the colours in units of a byte, (3, 1, 1); made once, as making them waits for the device."""
    return torch.tensor(values, device=device).view(3, 1, 1) * 255


def _crop(images: Tensor, moves: Tensor, mirrored: Tensor, margin: int) -> Tensor:
    """Cut (N, C, H, W) out of the images with `margin` black pixels around, at `moves` (N, 2)."""
    count, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (margin,) * 4)
    rows = torch.arange(height, device=images.device) + moves[:, :1]
    columns = torch.arange(width, device=images.device).expand(count, -1)
    columns = torch.where(mirrored[:, None], width - 1 - columns, columns) + moves[:, 1:]
    which = torch.arange(count, device=images.device)[:, None, None]
    return padded[which, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _fetched(images: Images, chosen: Sequence[Sequence[int]], workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    loader: DataLoader[Any] = DataLoader(_Whole(images, chosen), batch_size=None, num_workers=workers)  # type: ignore[arg-type]
    for fetched in loader:
        # Raised here: the loader would wrap what a worker raises in its traceback.
        if isinstance(fetched, CommandError):
            raise fetched
        yield fetched


@dataclass(frozen=True, slots=True)
class _Whole:
    """Whole batches, as the items of a data set that DataLoader can spread over its workers."""

    images: Images
    chosen: Sequence[Sequence[int]]

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor] | CommandError:
        if number >= len(self.chosen):
            raise IndexError(number)
        try:
            return self.images.fetch(self.chosen[number])
        except CommandError as error:
            return error

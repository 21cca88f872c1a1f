"""Grey images for models of one channel: of digits all colours are alike, so the first is enough."""

from collections.abc import Iterator

import torch

from densenet_models.train import Batch

from .batches import Batches
from .data import Images

GREY = 1
"""Channels."""


class GreyBatches(Batches):
    """The same batches with the first colour alone."""

    def training(self, images: Images, epoch: int, first: int = 0) -> Iterator[Batch]:
        """See `Batches`."""
        return self._grey(super().training(images, epoch, first))

    def evaluation(self, images: Images) -> Iterator[Batch]:
        """See `Batches`."""
        return self._grey(super().evaluation(images))

    def _grey(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        memory_format = torch.channels_last if self.channels_last else torch.contiguous_format
        for images, labels in batches:
            yield images[:, :GREY].contiguous(memory_format=memory_format), labels

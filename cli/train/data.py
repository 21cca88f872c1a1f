"""Images to train on: what a data set must offer, and which one a path holds."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..errors import CommandError

VALIDATION_SHARE = 0.1
"""Of the training images, unless the user says how many."""


class Images(Protocol):
    """Images that can be fetched by their numbers."""

    def __len__(self) -> int:
        """How many."""
        ...

    def fetch(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images (N, 3, H, W), uint8, and labels (N,), int64, on the CPU.

        Raises:
            CommandError: an image cannot be read.
        """
        ...


@dataclass(frozen=True, slots=True)
class InMemory:
    """All images as one tensor (N, 3, H, W), uint8, with labels (N,), int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def fetch(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """See `Images`."""
        chosen = torch.tensor(numbers, dtype=torch.int64)
        return self.images.index_select(0, chosen), self.labels.index_select(0, chosen)


@dataclass(frozen=True, slots=True)
class Part:
    """Some of the images, renumbered."""

    whole: Images
    numbers: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.numbers)

    def fetch(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """See `Images`."""
        return self.whole.fetch([self.numbers[number] for number in numbers])


@dataclass(frozen=True, slots=True)
class DataSet:
    """Images and what is known of them.

    Attributes:
        name: as it is printed.
        train: to train on, validation included until `split`.
        test: to test the best weights on; None if there are none.
        classes: how many.
        size: height and width.
        mean: of each colour, in units of white.
        deviation: likewise.
        flip: whether an image's mirror image is of the same class.
        lazy: whether images are read from files when they are fetched, which is worth processes of its own.
    """

    name: str
    train: Images
    test: Images | None
    classes: int
    size: int
    mean: tuple[float, float, float]
    deviation: tuple[float, float, float]
    flip: bool
    lazy: bool = False


def load_data(path: str | None, image_size: int) -> DataSet:
    """The data set at `path`: CIFAR-10 or CIFAR-100 as published, or a folder of images; None for the digits.

    Raises:
        CommandError: there is nothing of the kind, or a file is damaged.
    """
    # Here, because these modules build on this one.
    from . import cifar, digits, folder

    if path is None:
        return digits.load()
    root = Path(path)
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise CommandError(f"--data {path} {what}. Name the folder that holds CIFAR or a folder of images per class.")
    found = cifar.find(root)
    return cifar.load(*found) if found else folder.load(root, image_size)


def split(images: Images, valid_size: int | None, seed: int) -> tuple[Part, Part]:
    """Training and validation images, chosen at random by the seed.

    Raises:
        CommandError: nothing would be left of one of them.
    """
    count = max(1, round(VALIDATION_SHARE * len(images))) if valid_size is None else valid_size
    if not 0 < count < len(images):
        raise CommandError(
            f"--valid-size {count} leaves nothing to train on: there are {len(images)} training images. Choose fewer."
        )
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).tolist()
    return Part(images, tuple(order[count:])), Part(images, tuple(order[:count]))


def require_labels(labels: Tensor, classes: int, place: Path) -> None:
    """Refuse labels that name no class.

    Raises:
        CommandError: with the first that does not.
    """
    wrong = ((labels < 0) | (labels >= classes)).nonzero().flatten().tolist()
    if wrong:
        raise CommandError(
            f"{place}: image {wrong[0]} has label {int(labels[wrong[0]])}, and there are classes 0 to {classes - 1}. "
            "The file is damaged or of another data set: fetch it again."
        )

"""A folder of images: one folder a class, below `train` and `test` or alone. Files are read when they are fetched."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CommandError
from .data import DataSet

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
TEST_FOLDERS = ("test", "val", "valid")
# Of ImageNet, as every model that was trained there takes them.
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, slots=True)
class Files:
    """Image files and their labels; scaled so that the shorter side fits and cut to a square when fetched."""

    paths: tuple[Path, ...]
    labels: tuple[int, ...]
    size: int

    def __len__(self) -> int:
        return len(self.paths)

    def fetch(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """See `Images`."""
        images = torch.stack([_read(self.paths[number], self.size) for number in numbers])
        return images, torch.tensor([self.labels[number] for number in numbers])


def load(root: Path, size: int) -> DataSet:
    """Find the images of a folder.

    Args:
        root: holds `train/CLASS/IMAGE` and, if there is a test set, `test/CLASS/IMAGE`; or `CLASS/IMAGE`.
        size: height and width that images are brought to.

    Raises:
        CommandError: there are none, Pillow is missing, or the test set has classes of its own.
    """
    _require_pillow()
    train_root = root / "train" if (root / "train").is_dir() else root
    classes = _classes(train_root)
    if not classes:
        raise CommandError(
            f"--data {root} holds neither CIFAR (cifar-10-batches-py, cifar-100-python or their binary versions) nor "
            "images in one folder a class. Name the folder above the classes, or above train and test."
        )
    test_root = next((root / name for name in TEST_FOLDERS if train_root != root and (root / name).is_dir()), None)
    return DataSet(
        name=f"images in {root}",
        train=_files(train_root, classes, size),
        test=None if test_root is None else _test_files(test_root, classes, size),
        classes=len(classes),
        size=size,
        mean=MEAN,
        deviation=DEVIATION,
        flip=True,
        lazy=True,
    )


def _classes(root: Path) -> tuple[str, ...]:
    return tuple(sorted(folder.name for folder in root.iterdir() if folder.is_dir() and _images(folder)))


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())


def _files(root: Path, classes: tuple[str, ...], size: int) -> Files:
    pairs = [(path, label) for label, name in enumerate(classes) for path in _images(root / name)]
    return Files(tuple(path for path, _ in pairs), tuple(label for _, label in pairs), size)


def _test_files(root: Path, classes: tuple[str, ...], size: int) -> Files:
    unknown = sorted(set(_classes(root)) - set(classes))
    if unknown:
        raise CommandError(
            f"{root / unknown[0]} is a class that the training images do not have. Give both the same folders."
        )
    return _files(root, classes, size)


def _require_pillow() -> None:
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise CommandError("Image files are read with Pillow, which is not installed: pip install pillow.") from error


def _read(path: Path, size: int) -> Tensor:
    from PIL import Image

    try:
        with Image.open(path) as file:
            image: Any = file.convert("RGB")
    except Exception as error:
        reason = " ".join(str(error).split())
        raise CommandError(f"{path} is cut short or no image ({reason}). Replace or remove it.") from error
    scale = size / min(image.size)
    image = image.resize([max(size, round(side * scale)) for side in image.size], Image.Resampling.BILINEAR)
    left, top = ((side - size) // 2 for side in image.size)
    square = image.crop((left, top, left + size, top + size))
    return torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).reshape(size, size, 3).permute(2, 0, 1)

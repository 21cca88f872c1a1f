"""CIFAR-10 and CIFAR-100 in the folders that they are published in, the Python or the binary version.

Krizhevsky: Learning Multiple Layers of Features from Tiny Images (2009), https://www.cs.toronto.edu/~kriz/cifar.html
"""

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..errors import CommandError
from .data import DataSet, InMemory, require_labels

SIZE = 32
PIXELS = 3 * SIZE * SIZE


@dataclass(frozen=True, slots=True)
class Kind:
    """One published folder.

    Attributes:
        name: of the data set.
        folder: its name.
        train: files.
        test: file.
        classes: how many.
        labels: key of the labels in a pickled file; None for a binary one.
        label_bytes: before the pixels of an image in a binary file; the last is the label.
        mean: of the training images' colours.
        deviation: likewise.
    """

    name: str
    folder: str
    train: tuple[str, ...]
    test: str
    classes: int
    labels: str | None
    label_bytes: int
    mean: tuple[float, float, float]
    deviation: tuple[float, float, float]


_TEN = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
_HUNDRED = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
KINDS = (
    Kind("CIFAR-10", "cifar-10-batches-py", _BATCHES, "test_batch", 10, "labels", 1, *_TEN),
    Kind("CIFAR-100", "cifar-100-python", ("train",), "test", 100, "fine_labels", 2, *_HUNDRED),
    Kind(
        "CIFAR-10",
        "cifar-10-batches-bin",
        tuple(f"{name}.bin" for name in _BATCHES),
        "test_batch.bin",
        10,
        None,
        1,
        *_TEN,
    ),
    Kind("CIFAR-100", "cifar-100-binary", ("train.bin",), "test.bin", 100, None, 2, *_HUNDRED),
)


def find(root: Path) -> tuple[Path, Kind] | None:
    """The published folder that `root` is or holds."""
    for kind in KINDS:
        for place in (root / kind.folder, root):
            if place.name == kind.folder and place.is_dir():
                return place, kind
    return None


def load(place: Path, kind: Kind) -> DataSet:
    """Read all of it into memory.

    Raises:
        CommandError: a file is missing or damaged, or NumPy is, which the Python version is pickled with.
    """
    parts = [_read(place / name, kind) for name in kind.train]
    train = InMemory(torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts]))
    test = _read(place / kind.test, kind)
    return DataSet(kind.name, train, test, kind.classes, SIZE, kind.mean, kind.deviation, flip=True)


def _read(path: Path, kind: Kind) -> InMemory:
    try:
        with path.open("rb") as file:
            pixels, labels = _unpickled(file, kind.labels) if kind.labels else _records(file, kind)
    except ImportError as error:
        raise CommandError(
            f"{path} is pickled with NumPy, which is not installed. Install it (pip install numpy), or use the binary "
            "version of the data set."
        ) from error
    except FileNotFoundError as error:
        raise CommandError(f"{path} is missing from {kind.name}. Unpack the whole archive.") from error
    except Exception as error:
        reason = " ".join(str(error).split())
        raise CommandError(f"{path} is cut short or damaged ({reason}). Fetch it again.") from error
    require_labels(labels, kind.classes, path)
    return InMemory(pixels.reshape(-1, 3, SIZE, SIZE), labels)


def _records(file: BinaryIO, kind: Kind) -> tuple[Tensor, Tensor]:
    size = kind.label_bytes + PIXELS
    content = bytearray(file.read())
    if not content or len(content) % size:
        raise ValueError(f"{len(content)} bytes are no multiple of {size}")
    records = torch.frombuffer(content, dtype=torch.uint8).reshape(-1, size)
    return records[:, kind.label_bytes :].clone(), records[:, kind.label_bytes - 1].long()


def _unpickled(file: BinaryIO, key: str) -> tuple[Tensor, Tensor]:
    content = _Unpickler(file, encoding="latin1").load()
    labels = torch.tensor(content[key], dtype=torch.int64)
    pixels = torch.frombuffer(bytearray(content["data"].tobytes()), dtype=torch.uint8)
    if pixels.numel() != len(labels) * PIXELS:
        raise ValueError(f"{pixels.numel()} bytes of pixels do not fit {len(labels)} labels")
    return pixels, labels


class _Unpickler(pickle.Unpickler):
    """Makes arrays and nothing else: a pickle can otherwise run any code."""

    def find_class(self, module: str, name: str) -> Any:
        import numpy

        allowed = {"_reconstruct": numpy.zeros(0).__reduce__()[0], "ndarray": numpy.ndarray, "dtype": numpy.dtype}
        if module.startswith("numpy") and name in allowed:
            return allowed[name]
        if (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no array")

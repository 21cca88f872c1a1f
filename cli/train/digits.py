"""The default data: 1797 handwritten digits, 8×8, enlarged to 32×32. They come with the command.

`digits.csv.gz` holds the digits of `sklearn.datasets.load_digits`, that is the test set of "Optical Recognition of
Handwritten Digits" (E. Alpaydin, C. Kaynak, UCI Machine Learning Repository, 1998, doi:10.24432/C50P49), licensed
CC BY 4.0. A line is 64 pixels from 0 to 16, row by row, and the digit.
"""

import gzip
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .data import DataSet, InMemory

FILE = Path(__file__).with_name("digits.csv.gz")
WHITE = 16
SIZE = 32
TEST_IMAGES = 297
"""The last ones."""
MEAN, DEVIATION = 0.3051, 0.3222
"""Of the training images, enlarged."""


def load() -> DataSet:
    """The digits, in grey; the last 297 to test on."""
    pixels, labels = read()
    large = F.interpolate(pixels[:, None].float(), size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    images = (large * (255 / WHITE)).round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    border = len(labels) - TEST_IMAGES
    return DataSet(
        name="handwritten digits",
        train=InMemory(images[:border], labels[:border]),
        test=InMemory(images[border:], labels[border:]),
        classes=10,
        size=SIZE,
        mean=(MEAN,) * 3,
        deviation=(DEVIATION,) * 3,
        flip=False,
    )


def read() -> tuple[Tensor, Tensor]:
    """Pixels (1797, 8, 8) from 0 to 16, uint8, and labels (1797,), int64."""
    with gzip.open(FILE, "rt", encoding="ascii") as file:
        rows = torch.tensor([[int(value) for value in line.split(",")] for line in file])
    return rows[:, :-1].reshape(-1, 8, 8).to(torch.uint8), rows[:, -1].contiguous()

"""Target files as users write them."""

import gc
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

TINY = """
import torch
from torch import nn


class Tiny(nn.Module):
    def __init__(self, growth=4, layers=3, classes=10):
        super().__init__()
        self.stem = nn.Conv2d(3, growth, 3, padding=1)
        self.layers = nn.ModuleList(self.layer(growth * (i + 1), growth) for i in range(layers))
        self.classifier = nn.Linear(growth * (layers + 1), classes)

    def layer(self, width, growth):
        return nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, growth, 3, padding=1))

    def forward(self, x):
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return self.classifier(torch.cat(features, 1).mean((2, 3)))


def factory(growth):
    return Tiny(growth)


def nothing():
    return [1]


def both(a, b):
    pass


instance = Tiny(2)
number = 3
missing = None
"""


@pytest.fixture(autouse=True)
def _quick_collections() -> Iterator[None]:
    """Measuring collects garbage often, which takes long with all of torch on the heap."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _imports_are_undone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith(("memopt_target_", "user_")):
            del sys.modules[name]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], str]:
    """Write a source file and return its path."""

    def write(name: str, source: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def tiny(write: Callable[[str, str], str]) -> str:
    """Path of a file with a small concat DenseNet."""
    return write("tiny.py", TINY)

"""A small naive DenseNet that every file here trains."""

import gc
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn


class TinyDense(nn.Module):
    """Stem, three layers of concat → norm → ReLU → convolution, pooling, classifier."""

    def __init__(self, growth: int = 4, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, growth, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(growth * i) for i in (1, 2, 3))
        self.convolutions = nn.ModuleList(nn.Conv2d(growth * i, growth, 3, padding=1) for i in (1, 2, 3))
        self.dropout = nn.Dropout(drop_rate)
        self.classifier = nn.Linear(growth * 4, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = [self.stem(x)]
        for norm, convolution in zip(self.norms, self.convolutions, strict=True):
            features.append(self.dropout(convolution(norm(torch.cat(features, 1)).relu())))
        return self.classifier(torch.cat(features, 1).mean((2, 3)))


@pytest.fixture(autouse=True)
def _quick_collections() -> Iterator[None]:
    """Measuring collects garbage often, which takes long with all of torch on the heap."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def make_tiny() -> Callable[..., nn.Module]:
    return TinyDense


@pytest.fixture
def images() -> tuple[torch.Tensor]:
    return (torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)),)


class Keeper:
    """Stands in for memopt: keeps a buffer from the first forward on, until it is removed."""

    def __init__(self, kept_bytes: int) -> None:
        self.kept_bytes = kept_bytes
        self.kept: list[torch.Tensor] = []

    def apply(self, model: nn.Module) -> nn.Module:
        self.handle = model.register_forward_pre_hook(self.keep)
        return model

    def keep(self, model: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if not self.kept:
            self.kept.append(torch.empty(self.kept_bytes, dtype=torch.uint8, device=args[0].device))

    def remove(self, model: nn.Module) -> nn.Module:
        self.kept.clear()
        self.handle.remove()
        return model


@pytest.fixture
def keeper() -> Keeper:
    return Keeper(kept_bytes=1 << 20)

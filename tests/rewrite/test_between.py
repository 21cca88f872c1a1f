"""What stands between the parts of a chain runs inside its region, to the bit; what it must not overtake, does not."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import memopt
from tests.helpers import assert_exact, images, reasons, rewritten_copy, train_step
from tests.wild.models import CHAINS, GROWTH, LAYERS, STEM, Layer, Net


class SumWithPast(Net):
    """One concat is read four times: by a norm, by a slice, by the next concat and after the block."""

    def block(self, x: torch.Tensor) -> torch.Tensor:
        first = x
        for layer in self.layers:
            first, past = x, x[:, :GROWTH]  # a view, which is read when the concat itself is no longer needed
            x = torch.cat([x, layer(x) + 0.5 * past], 1)
        return x + 0.1 * first.mean()


class Views(Net):
    """A norm reads a view of the concat, which must not be overwritten by the norm's own result."""

    def block(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x.unflatten(1, (2, -1)).flatten(1, 2))], 1)
        return x


class Slices(Net):
    """A norm reads some of the channels: a tensor that is not dense."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(STEM + GROWTH * index - 2) for index in range(LAYERS))

    def block(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x[:, 2:])], 1)
        return x


class SharedGate(Net):
    """Every layer's feature passes the same gate, which reads it twice."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(GROWTH, GROWTH)

    def block(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            new = layer(x)
            x = torch.cat([x, new * torch.sigmoid(self.gate(new.mean((2, 3))))[:, :, None, None]], 1)
        return x


class StandardisedWeights(Net):
    """Weights are computed from parameters just before they are used."""

    def block(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            weight = layer.conv1.weight
            weight = (weight - weight.mean((1, 2, 3), keepdim=True)) / (weight.std((1, 2, 3), keepdim=True) + 1e-5)
            narrow = F.conv2d(layer.act1(layer.norm1(x)), weight)
            x = torch.cat([x, layer.conv2(layer.act2(layer.norm2(narrow)))], 1)
        return x


class ReadsStatistics(Net):
    """Running statistics are read right after the norm has moved them: that read must not come before."""

    def block(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            new = layer(x)
            x = torch.cat([x, new * (1 + layer.norm1.running_mean.mean())], 1)
        return x


class Normalised(Net):
    """A function that reads its input twice."""

    def block(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.cat([x, F.normalize(layer(x), dim=1)], 1)
        return x


class CutGradient(Net):
    def block(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            new = layer(x)
            x = torch.cat([x, new * torch.sigmoid(new.detach())], 1)
        return x


class Noise(Net):
    """Random numbers between a layer and the concat."""

    def block(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            new = layer(x)
            x = torch.cat([x, new * torch.empty(len(new), 1, 1, 1).bernoulli_(0.7)], 1)
        return x


class Attention(Net):
    """Matrix products, for which ATen chooses other kernels where no gradients are recorded."""

    def block(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            new = layer(x)
            rows = new.flatten(2)
            x = torch.cat([x, (torch.softmax(rows @ rows.transpose(1, 2), -1) @ rows).view_as(new)], 1)
        return x


class ChannelsInnermost(Net):
    """LayerNorm over channels, the tensor turned round it and back."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [STEM + GROWTH * index for index in range(LAYERS)]
        self.norms = nn.ModuleList(nn.LayerNorm(size) for size in sizes)
        self.convs = nn.ModuleList(nn.Conv2d(size, GROWTH, 3, padding=1) for size in sizes)

    def block(self, x: torch.Tensor) -> torch.Tensor:
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = torch.cat([x, conv(F.gelu(norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)))], 1)
        return x


@pytest.mark.parametrize(
    ("make", "chains"),
    [
        (SumWithPast, CHAINS),
        (Views, LAYERS),
        (Slices, LAYERS),
        (SharedGate, CHAINS),
        (StandardisedWeights, CHAINS),
        (ReadsStatistics, CHAINS),
        (Normalised, CHAINS),
        (CutGradient, CHAINS),
        (Noise, CHAINS),
        (Attention, CHAINS),
        (ChannelsInnermost, LAYERS),
    ],
)
def test_what_stands_between_is_exact(make: Callable[[], nn.Module], chains: int) -> None:
    torch.manual_seed(0)
    assert_exact(make(), images(size=8), at_least=chains, steps=3)


class AppendsToItsArgument(nn.Module):
    """A block that hands out its features through a list of the caller's."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Net()

    def forward(self, x: torch.Tensor, kept: list[torch.Tensor]) -> torch.Tensor:
        x = self.inner.block(self.inner.stem(x))
        kept.append(x)
        return self.inner.head(x)


def test_a_forward_that_changes_its_argument_is_refused() -> None:
    torch.manual_seed(0)
    model = memopt.apply(AppendsToItsArgument())
    kept: list[torch.Tensor] = []

    with pytest.warns(UserWarning, match="changes one of its arguments"):
        model(images(size=8), kept)
    model(images(size=8), kept)

    assert len(kept) == 2
    assert "test_between.py:" in reasons(model)


class CountsOnItsClass(Net):
    seen = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        type(self).seen += 1
        return super().forward(x)


def test_what_forward_writes_to_its_class_arrives_at_the_users() -> None:
    torch.manual_seed(0)

    rewritten = rewritten_copy(CountsOnItsClass())

    with pytest.warns(UserWarning, match=r"test_between\.py:\d+: forward changes CountsOnItsClass\.seen"):
        train_step(rewritten, (images(size=8),))

    assert CountsOnItsClass.seen == 1

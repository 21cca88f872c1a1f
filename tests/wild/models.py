"""DenseNets as people really write them, small: one function a form, and look-alikes that are none."""

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

GROWTH, STEM, LAYERS = 4, 8, 3
Make = Callable[..., nn.Module]


class Layer(nn.Module):
    """Norm, activation, 1×1, norm, activation, 3×3 of whatever it is given."""

    def __init__(self, channels: int, norm: Make = nn.BatchNorm2d, activation: Make = nn.ReLU) -> None:
        super().__init__()
        self.norm1, self.act1 = norm(channels), activation()
        self.conv1 = nn.Conv2d(channels, 8, 1, bias=False)
        self.norm2, self.act2 = norm(8), activation()
        self.conv2 = nn.Conv2d(8, GROWTH, 3, padding=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv1(self.act1(self.norm1(x)))
        return self.conv2(self.act2(self.norm2(x)))


class Net(nn.Module):
    """A stem, one dense block in the growing style, a norm, a classifier."""

    def __init__(self, norm: Make = nn.BatchNorm2d, activation: Make = nn.ReLU) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, STEM, 3, padding=1)
        sizes = [STEM + GROWTH * index for index in range(LAYERS)]
        self.layers = nn.ModuleList(Layer(size, norm, activation) for size in sizes)
        self.norm = nn.BatchNorm2d(STEM + GROWTH * LAYERS)
        self.classifier = nn.Linear(STEM + GROWTH * LAYERS, 5)

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.block(self.stem(x)))

    def block(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return x

    def head(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(F.relu(self.norm(x)).mean((2, 3)))


class Prepended(Net):
    def block(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.cat([layer(x), x], 1)
        return x


class Lists(Net):
    """Every spelling of a concat, one of a single tensor among them."""

    def block(self, x: torch.Tensor) -> torch.Tensor:
        features = [x]
        for index, layer in enumerate(self.layers):
            spellings = (
                lambda: torch.cat(features, dim=1),
                lambda: torch.concat(tuple(features), axis=1),
                lambda: torch.concatenate(features, dim=-3),
            )
            features.append(layer(spellings[index]()))
        return torch.cat((*features,), 1)


class LegacyEmpty(Net):
    """Starts from the empty tensor that torch lets a concat begin with."""

    def block(self, x: torch.Tensor) -> torch.Tensor:
        features = torch.empty(0)
        features = torch.cat([features, x], 1)
        for layer in self.layers:
            features = torch.cat([features, layer(features)], 1)
        return features


class Swish(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.5 * x)


class NormAct(nn.BatchNorm2d):
    """A fused norm and activation, as timm has it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(super().forward(x))


class InplaceABN(nn.Module):
    """A norm that is no subclass of torch's."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, 1e-5)
        return F.leaky_relu(x, 0.01)


class Frozen(nn.BatchNorm2d):
    """Its `train` returns nothing."""

    def train(self, mode: bool = True) -> None:
        super().train(False)


class MaskedConv(nn.Conv2d):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("mask", (torch.arange(self.weight.numel()) % 3 > 0).float().view_as(self.weight))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.weight * self.mask, self.bias, self.stride, self.padding)


def with_first_convolution(make: Callable[[int], nn.Module]) -> nn.Module:
    net = Net()
    for layer in net.layers:
        layer.conv1 = make(layer.conv1.in_channels)
    return net


class NoBottleneck(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(channels), nn.Conv2d(channels, GROWTH, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.relu(self.norm(x)))


def without_bottlenecks() -> nn.Module:
    net = Net()
    net.layers = nn.ModuleList(NoBottleneck(STEM + GROWTH * index) for index in range(LAYERS))
    return net


class FunctionalDropout(Net):
    def block(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.cat([x, F.dropout(layer(x), 0.3, training=self.training)], 1)
        return x


class DualPath(Net):
    """Two norms read every concat."""

    def __init__(self) -> None:
        super().__init__()
        self.others = nn.ModuleList(Layer(STEM + GROWTH * index) for index in range(LAYERS))

    def block(self, x: torch.Tensor) -> torch.Tensor:
        for layer, other in zip(self.layers, self.others, strict=True):
            x = torch.cat([x, layer(x) + other(x)], 1)
        return x


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gate = nn.Linear(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(self.gate(x.mean((2, 3))))[:, :, None, None]


class GatedFeatures(Net):
    """Squeeze and excitation behind every layer."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.ModuleList(SqueezeExcite(GROWTH) for _ in range(LAYERS))

    def block(self, x: torch.Tensor) -> torch.Tensor:
        for layer, gate in zip(self.layers, self.gates, strict=True):
            x = torch.cat([x, gate(layer(x))], 1)
        return x


class GatedConcats(Net):
    """Squeeze and excitation between a concat and its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.ModuleList(SqueezeExcite(STEM + GROWTH * index) for index in range(LAYERS))

    def block(self, x: torch.Tensor) -> torch.Tensor:
        for layer, gate in zip(self.layers, self.gates, strict=True):
            x = torch.cat([x, layer(gate(x))], 1)
        return x


class Shuffled(Net):
    """Channels change places between a concat and its norm."""

    def block(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            backwards = torch.arange(x.shape[1] - 1, -1, -1, device=x.device)
            x = torch.cat([x, layer(x.index_select(1, backwards))], 1)
        return x


class ShuffledGroups(Net):
    """ShuffleNet's shuffle between a concat and its norm."""

    def block(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            n, c, h, w = x.shape
            x = torch.cat([x, layer(x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))], 1)
        return x


class RandomlyShuffled(Net):
    """Channels change places by chance, drawn anew for every layer."""

    def block(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x[:, torch.randperm(x.shape[1], device=x.device)])], 1)
        return x


class DroppedConcats(Net):
    """Dropout between a concat and its norm."""

    def block(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(F.dropout(x, 0.3, training=self.training))], 1)
        return x


class FunctionalLayer(Layer):
    """Activations that are no modules, another in every layer."""

    functions = (
        torch.relu,
        lambda x: x.relu(),
        lambda x: F.leaky_relu(x, 0.1, inplace=True),
        F.gelu,
        F.silu,
        torch.relu_,
    )

    def __init__(self, index: int) -> None:
        super().__init__(STEM + GROWTH * index)
        self.index = index

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = (self.functions[(2 * self.index + offset) % len(self.functions)] for offset in (0, 1))
        return self.conv2(second(self.norm2(self.conv1(first(self.norm1(x))))))


def _functional_activations() -> nn.Module:
    net = Net()
    net.layers = nn.ModuleList(FunctionalLayer(index) for index in range(LAYERS))
    return net


class NormTwice(DualPath):
    """Both readers of a concat go through one norm module."""

    def __init__(self) -> None:
        super().__init__()
        for layer, other in zip(self.layers, self.others, strict=True):
            other.norm1 = layer.norm1


class CountingNorm(nn.BatchNorm2d):
    """Counts in Python how often it ran."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(x) / self.calls


class Deciding(Net):
    """Branches on values of a tensor."""

    def block(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x) if x.mean() > 0 else -layer(x)], 1)
        return x


class Cropped(Net):
    def block(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            new = layer(x)
            x = torch.cat([x[:, :, 1:-1, 1:-1], new[:, :, 1:-1, 1:-1]], 1)
        return x


class Branching(Net):
    """Branches on shapes and on flags, loops over children, odd names, arguments with defaults."""

    def __init__(self) -> None:
        super().__init__()
        self.by_name = nn.ModuleDict({"a/b": Layer(STEM + GROWTH * LAYERS), "c-d": nn.Identity()})
        self.norm = nn.BatchNorm2d(STEM + GROWTH * (LAYERS + 1))
        self.classifier = nn.Linear(STEM + GROWTH * (LAYERS + 1), 5)

    def forward(self, x: torch.Tensor, pad: bool = True, scale: float | None = None) -> torch.Tensor:
        if pad and x.shape[-1] % 2:
            x = F.pad(x, (0, 1, 0, 1))
        x = self.block(self.stem(x))
        for name, child in self.by_name.items():
            x = torch.cat([x, child(x)], 1) if name == "a/b" else child(x)
        if x.requires_grad and scale is not None:
            x = x * scale
        return self.head(x)


class Checkpointed(Net):
    def __init__(self, use_reentrant: bool = False) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant

    def block(self, x: torch.Tensor) -> torch.Tensor:
        features = [x]
        for layer in self.layers:

            def bottleneck(*inputs: torch.Tensor, layer: nn.Module = layer) -> torch.Tensor:
                return layer.conv1(layer.act1(layer.norm1(torch.cat(inputs, 1))))

            narrow = checkpoint(bottleneck, *features, use_reentrant=self.use_reentrant)
            features.append(layer.conv2(layer.act2(layer.norm2(narrow))))
        return torch.cat(features, 1)


class CountingCheckpoints(Checkpointed):
    """What is checkpointed changes with every call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def block(self, x: torch.Tensor) -> torch.Tensor:
        def scaled(x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return x / (1 + self.calls % 2)

        return super().block(checkpoint(scaled, x, use_reentrant=False))


class ActivatedFeature(Net):
    """An in-place activation on what is concatenated next."""

    def block(self, x: torch.Tensor) -> torch.Tensor:
        features = [x]
        for layer in self.layers:
            features.append(F.relu(layer(torch.cat(features, 1)), inplace=True))
        return torch.cat(features, 1)


class Overwritten(Net):
    """An in-place activation on a concat that the next layer reads, too."""

    def block(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            new = layer(x)
            x = torch.cat([x, new], 1)
            F.relu_(x)
        return x


class OverwrittenFeature(Net):
    """Every feature is written to once it is concatenated, which eager allows: a concat is a copy."""

    def block(self, x: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(())
        for layer in self.layers:
            new = layer(x)
            x = torch.cat([x, new], 1)
            total = total + new.mul_(2.0).mean()
        return x + total


class Skips(Net):
    """The activated tensor and every concat leave the model."""

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        x, kept = self.stem(x), []
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
            kept.append(x)
        activated = F.relu(self.norm(x))
        return [*kept, activated, self.classifier(activated.mean((2, 3)))]


class Counting(Net):
    """A buffer of its own, changed at every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.add_(len(x))
        return super().forward(x)


class StochasticDepth(Net):
    def block(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            skipped = self.training and random.random() < 0.5
            x = torch.cat([x, torch.zeros_like(x[:, :GROWTH]) if skipped else layer(x)], 1)
        return x


class Scheduled(Net):
    """What it does depends on how often it ran."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        return super().forward(x) * min(1.0, self.steps / 10)


class FrozenStem(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            x = self.stem(x)
        return self.head(self.block(x))


class OwnAutocast(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.block(self.stem(x))
        return self.head(x.float())


class AutocastLayers(Net):
    def block(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                new = layer(x)
            x = torch.cat([x, new], 1)
        return x


class DenseUNet(nn.Module):
    """FC-DenseNet: dense blocks down and up, skips joined to what comes back up."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, STEM, 3, padding=1)
        wide = STEM + GROWTH * LAYERS
        self.down = nn.ModuleList(NoBottleneck(STEM + GROWTH * i) for i in range(LAYERS))
        self.transition_down = nn.Sequential(
            nn.BatchNorm2d(wide), nn.ReLU(True), nn.Conv2d(wide, wide, 1), nn.Dropout2d(0.2), nn.MaxPool2d(2)
        )
        self.middle = nn.ModuleList(NoBottleneck(wide + GROWTH * i) for i in range(LAYERS))
        self.transition_up = nn.ConvTranspose2d(GROWTH * LAYERS, GROWTH * LAYERS, 2, stride=2)
        joined = wide + GROWTH * LAYERS
        self.up = nn.ModuleList(NoBottleneck(joined + GROWTH * i) for i in range(LAYERS))
        self.final = nn.Conv2d(GROWTH * LAYERS, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for layer in self.down:
            x = torch.cat([x, layer(x)], 1)
        skip, x, new = x, self.transition_down(x), []
        for layer in self.middle:
            new.append(layer(x))
            x = torch.cat([x, new[-1]], 1)
        x = torch.cat([self.transition_up(torch.cat(new, 1)), skip], 1)
        new = []
        for layer in self.up:
            new.append(layer(x))
            x = torch.cat([x, new[-1]], 1)
        return self.final(torch.cat(new, 1))


class CalledAutocast(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        torch.set_autocast_enabled("cpu", True)
        x = self.block(x)
        torch.set_autocast_enabled("cpu", False)
        torch.clear_autocast_cache()
        return self.head(x.float())


class Averaging(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(STEM))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        with torch.no_grad():
            self.average.mul_(0.9).add_(x.mean((0, 2, 3)))
        return self.head(self.block(x - self.average[:, None, None]))


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return (8 * x).round() / 8

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return 2 * grad


class Rounded(Net):
    """A gradient of its own behind every layer."""

    def block(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.cat([x, StraightThrough.apply(layer(x))], 1)
        return x


def _shared_activation() -> nn.Module:
    activation = nn.ReLU(inplace=True)
    return Net(activation=lambda: activation)


CHAINS = LAYERS + 1
"""A layer each, and the last norm."""
FORMS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "growing": (Net, CHAINS),
    "prepended": (Prepended, CHAINS),
    "lists in every spelling": (Lists, CHAINS),
    "legacy empty tensor": (LegacyEmpty, CHAINS),
    "in-place activation, shared": (_shared_activation, CHAINS),
    "activation of several operations": (lambda: Net(activation=Swish), CHAINS),
    "activations as functions": (_functional_activations, CHAINS),
    "LeakyReLU": (lambda: Net(activation=lambda: nn.LeakyReLU(0.1)), CHAINS),
    "PReLU": (lambda: Net(activation=nn.PReLU), CHAINS),
    "no activation": (lambda: Net(activation=nn.Identity), CHAINS),
    "functional dropout": (FunctionalDropout, CHAINS),
    "fused norm and activation": (lambda: Net(norm=NormAct, activation=nn.Identity), CHAINS),
    "norm of its own class": (lambda: Net(norm=InplaceABN, activation=nn.Identity), CHAINS),
    "norm averaged over all steps": (
        lambda: Net(norm=lambda channels: nn.BatchNorm2d(channels, momentum=None)),
        CHAINS,
    ),
    "norm without running statistics": (
        lambda: Net(norm=lambda channels: nn.BatchNorm2d(channels, track_running_stats=False)),
        CHAINS,
    ),
    "frozen norm": (lambda: Net(norm=Frozen), CHAINS),
    "GroupNorm": (lambda: Net(norm=lambda channels: nn.GroupNorm(2, channels)), CHAINS),
    "InstanceNorm": (lambda: Net(norm=lambda channels: nn.InstanceNorm2d(channels, affine=True)), CHAINS),
    "no bottleneck": (without_bottlenecks, CHAINS),
    "grouped convolution": (lambda: with_first_convolution(lambda c: nn.Conv2d(c, 8, 1, groups=4)), CHAINS),
    "masked convolution": (lambda: with_first_convolution(lambda c: MaskedConv(c, 8, 1)), CHAINS),
    "two norms on one concat": (DualPath, 2 * LAYERS + 1),
    "gated features": (GatedFeatures, CHAINS),
    "gated concats": (GatedConcats, LAYERS),
    "shuffled channels": (Shuffled, LAYERS),
    "random channels": (RandomlyShuffled, LAYERS),
    "overwritten concats": (Overwritten, CHAINS),
    "channel shuffle": (ShuffledGroups, LAYERS),
    "dropout between": (DroppedConcats, LAYERS),
    "one norm at two places": (NormTwice, 2 * LAYERS + 1),
    "cropped": (Cropped, LAYERS),
    "branches and odd names": (Branching, CHAINS + 1),
    "activated features": (ActivatedFeature, CHAINS),
    "skips and lists": (Skips, LAYERS),
    "buffer of its own": (Counting, CHAINS),
    "buffer averaged under no_grad": (Averaging, CHAINS),
    "no_grad inside": (FrozenStem, CHAINS),
    "autocast inside": (OwnAutocast, LAYERS),
    "autocast around every layer": (AutocastLayers, LAYERS),
    "autograd function of its own": (Rounded, CHAINS),
    "dense U-Net": (DenseUNet, 3 * LAYERS),
    "in DataParallel": (lambda: nn.DataParallel(Net()), CHAINS),
}
"""By form: the model, and how many chains at least run rewritten."""
REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "stochastic depth": (StochasticDepth, "random numbers outside torch"),
    "scheduled": (Scheduled, "steps"),
    "autocast by a call": (CalledAutocast, "by a call. Write a block"),
    "norm that counts": (lambda: Net(norm=CountingNorm), "calls"),
    "branch on values": (Deciding, "needs the value of a tensor"),
    "checkpoint that counts": (CountingCheckpoints, "calls"),
}
"""By form: the model, and what the reason says."""
REJECTED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "overwritten features": (OverwrittenFeature, "overwrites"),
}
"""By form: the model, which is recorded, and what the reason says for which some of its chains are left as they are."""

NOT_APPLICABLE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "compiled": (lambda: torch.compile(Net()), r"memopt\.apply first"),
    "traced": (lambda: torch.jit.trace(Net().eval(), torch.zeros(2, 3, 12, 12)), "ScriptModule"),
}
"""By form: what `apply` raises CaptureError for, and what the error says."""


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(11, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        below = F.interpolate(F.relu(self.norm(self.down(x))), scale_factor=2.0)
        return self.up(torch.cat([x, below], 1)).mean((2, 3))


class Inception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(3, 4, size, padding=size // 2), nn.BatchNorm2d(4), nn.ReLU()) for size in (1, 3, 5)
        )
        self.last = nn.Conv2d(12, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.cat([branch(x) for branch in self.branches], 1)).mean((2, 3))


class OneShot(nn.Module):
    """VoVNet: all features joined once, and then a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3 if i == 0 else 4, 4, 3, padding=1) for i in range(3))
        self.last = nn.Sequential(nn.Conv2d(15, 8, 1), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = [x]
        for conv in self.convs:
            features.append(F.relu(conv(features[-1])))
        return self.last(torch.cat(features, 1)).mean((2, 3))


class ResidualDense(nn.Module):
    """RRDB: dense connections without a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3 + 4 * i, 4, 3, padding=1) for i in range(3))
        self.last = nn.Conv2d(15, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = [x]
        for conv in self.convs:
            features.append(F.leaky_relu(conv(torch.cat(features, 1)), 0.2))
        return (x + 0.2 * self.last(torch.cat(features, 1))).mean((2, 3))


class Shuffle(nn.Module):
    """ShuffleNet: halves joined, their channels mixed, split again."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.branch = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = self.stem(x).chunk(2, 1)
        joined = torch.cat([left, self.branch(right)], 1)
        n, c, h, w = joined.shape
        return joined.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w).mean((2, 3))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.conv = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return (x + self.conv(F.relu(self.norm(x)))).mean((2, 3))


class Siamese(nn.Module):
    """Joins two batches, not channels."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.relu(self.norm(torch.cat([x, x.flip(3)], 0)))).mean((2, 3))


class ConvNormAct(nn.Sequential):
    """Convolution first, as in all of the look-alikes below."""

    def __init__(self, fan_in: int, fan_out: int, kernel: int = 3) -> None:
        super().__init__(
            nn.Conv2d(fan_in, fan_out, kernel, padding=kernel // 2), nn.BatchNorm2d(fan_out), nn.ReLU(inplace=True)
        )


class Harmonic(nn.Module):
    """HarDNet: layer k reads the features that lie powers of two behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.links = [[0], [1, 0], [2], [3, 2, 0]]
        self.layers = nn.ModuleList(ConvNormAct(sum(3 if i == 0 else 4 for i in link), 4) for link in self.links)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = [x]
        for link, layer in zip(self.links, self.layers, strict=True):
            features.append(layer(torch.cat([features[i] for i in link], 1)))
        return torch.cat(features, 1).mean((2, 3))


class ResidualDenseNetwork(ResidualDense):
    """RDN: residual dense blocks, and all their results joined once more."""

    def __init__(self) -> None:
        super().__init__()
        self.second, self.fuse = ResidualDense(), nn.Conv2d(6, 3, 1)

    def dense(self, x: torch.Tensor) -> list[torch.Tensor]:
        features = [x]
        for conv in self.convs:
            features.append(F.relu(conv(torch.cat(features, 1))))
        return features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one = x + self.last(torch.cat(self.dense(x), 1))
        return self.fuse(torch.cat([one, one + self.second.last(torch.cat([one] * 5, 1))], 1)).mean((2, 3))


class MultiScale(nn.Module):
    """MSDNet: two scales, each joined with what comes down from the finer one."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.ModuleList(ConvNormAct(3 + 4 * i, 4) for i in range(2))
        self.coarse = nn.ModuleList(ConvNormAct(3 + 8 * i, 4) for i in range(2))
        self.down = nn.ModuleList(nn.Sequential(nn.MaxPool2d(2), ConvNormAct(3 + 4 * i, 4)) for i in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fine, coarse = x, F.avg_pool2d(x, 2)
        for near, far, down in zip(self.fine, self.coarse, self.down, strict=True):
            coarse = torch.cat([coarse, far(coarse), down(fine)], 1)
            fine = torch.cat([fine, near(fine)], 1)
        return coarse.mean((2, 3))


class TwoWay(nn.Module):
    """PeleeNet: dense connections of two branches, convolution before norm."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.ModuleList(nn.Sequential(ConvNormAct(3 + 8 * i, 8, 1), ConvNormAct(8, 4)) for i in range(LAYERS))
        self.right = nn.ModuleList(
            nn.Sequential(ConvNormAct(3 + 8 * i, 8, 1), ConvNormAct(8, 4), ConvNormAct(4, 4)) for i in range(LAYERS)
        )
        self.last = ConvNormAct(3 + 8 * LAYERS, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for left, right in zip(self.left, self.right, strict=True):
            x = torch.cat([x, left(x), right(x)], 1)
        return self.last(x).mean((2, 3))


class GoogLeNet(nn.Module):
    """Inception modules one after another, pooled branches among them."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.ModuleList(
                [
                    ConvNormAct(width, 4, 1),
                    nn.Sequential(ConvNormAct(width, 4, 1), ConvNormAct(4, 4)),
                    nn.MaxPool2d(3, 1, 1),
                ]
            )
            for width in (3, 11)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for stage in self.stages:
            x = torch.cat([branch(x) for branch in stage], 1)
        return x.mean((2, 3))


LOOK_ALIKES: dict[str, Callable[[], nn.Module]] = {
    "U-Net": UNet,
    "Inception": Inception,
    "VoVNet": OneShot,
    "RRDB": ResidualDense,
    "ShuffleNet": Shuffle,
    "GoogLeNet": GoogLeNet,
    "HarDNet": Harmonic,
    "RDN": ResidualDenseNetwork,
    "MSDNet": MultiScale,
    "PeleeNet": TwoWay,
    "ResNet": Residual,
    "concat of batches": Siamese,
}

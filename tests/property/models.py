"""DenseNets as people write them, one `Recipe` for each combination of habits."""

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Concat = Callable[[Sequence[Tensor]], Tensor]

CONCATS: dict[str, Concat] = {
    "cat(x, 1)": lambda x: torch.cat(x, 1),
    "cat(x, dim=1)": lambda x: torch.cat(x, dim=1),
    "cat(x, axis=1)": lambda x: torch.cat(x, axis=1),
    "cat(x, -n)": lambda x: torch.cat(x, 1 - x[0].dim()),
    "cat(tensors=x, dim=1)": lambda x: torch.cat(tensors=x, dim=1),
    "concat(x, dim=1)": lambda x: torch.concat(x, dim=1),
    "concatenate(x, axis=1)": lambda x: torch.concatenate(x, axis=1),
    "hstack(x)": lambda x: torch.hstack(x),
}
NORMS = (
    "batch",
    "batch, not affine",
    "batch, no statistics",
    "batch, cumulative",
    "batch, slow",
    "batch, functional",
    "group",
    "group, not affine",
    "instance",
    "instance, affine",
    "layer",
)
ACTIVATIONS: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "ReLU()": nn.ReLU,
    "ReLU(inplace)": lambda: nn.ReLU(inplace=True),
    "F.relu": lambda: F.relu,
    "F.relu(inplace)": lambda: lambda x: F.relu(x, inplace=True),
    "torch.relu": lambda: torch.relu,
    "x.relu()": lambda: lambda x: x.relu(),
    "x.relu_()": lambda: lambda x: x.relu_(),
    "LeakyReLU(inplace)": lambda: nn.LeakyReLU(0.1, inplace=True),
    "GELU": nn.GELU,
    "F.gelu(tanh)": lambda: lambda x: F.gelu(x, approximate="tanh"),
    "SiLU": nn.SiLU,
    "x * sigmoid(x)": lambda: lambda x: x * torch.sigmoid(x),
    "x.mul_(x.sigmoid())": lambda: lambda x: x.clone().mul_(x.sigmoid()),
    "ELU(inplace)": lambda: nn.ELU(inplace=True),
    "F.elu(inplace)": lambda: lambda x: F.elu(x, 0.5, True),
    "PReLU": nn.PReLU,
    "Hardswish": nn.Hardswish,
    "Identity": nn.Identity,
    "none": lambda: lambda x: x,
}
STYLES = ("list", "tuple", "growing", "prepended", "sandwich")
EXTRAS = (
    "none",
    "second norm",
    "shared activation",
    "shared norm",
    "shared convolution",
    "skip",
    "squeeze before norm",
    "squeeze on feature",
    "activated feature",
    "shuffle",
    "late in place",
)
DROPOUTS = ("none", "module", "functional", "channels", "in place")
PLAIN_EXTRAS = frozenset({"none", "squeeze on feature", "activated feature"})
_CONV: Any = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_BATCH_NORM: Any = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_INSTANCE_NORM: Any = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
_CHANNEL_DROPOUT: Any = {1: nn.Dropout1d, 2: nn.Dropout2d, 3: nn.Dropout3d}
_POOL: Any = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


HARMLESS = frozenset({"none", "buffer in place", "buffer under no_grad", "autocast off"})
"""Effects that a recording carries."""


class _Settings:
    """An object of the user's that forward reads and writes."""

    def __init__(self) -> None:
        self.rate = 1.0


RATES = [1.0]


def _private(model: Any) -> float:
    model._steps += 1.0
    return model._steps


def _object(model: Any) -> float:
    model.settings.rate += 1
    return model.settings.rate


def _nested(model: Any) -> float:
    model.table["rates"][0] += 1
    return model.table["rates"][0]


def _global(model: Any) -> float:
    RATES[0] += 1
    return RATES[0]


def _on_class(model: Any) -> float:
    type(model).shared += 1
    return model.shared


def _in_place(model: Any) -> Tensor:
    return model.average.add_(0.5)


def _under_no_grad(model: Any) -> Tensor:
    with torch.no_grad():
        model.average.mul_(0.9).add_(0.1)
    return model.average


def _rebound(model: Any) -> Tensor:
    model.average = model.average + 0.5
    return model.average


def _without_autocast(model: Any) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return model.average * 2 + 1


EFFECTS: dict[str, Callable[[Any], Any]] = {
    "none": lambda model: 1.0,
    "private counter": _private,
    "object": _object,
    "nested container": _nested,
    "global": _global,
    "class attribute": _on_class,
    "python random": lambda model: random.random(),
    "own python random": lambda model: model.generator.random(),
    "numpy random": lambda model: float(numpy.random.rand()),
    "own numpy random": lambda model: float(model.numpy_generator.random()),
    "iterator": lambda model: next(model.schedule),
    "seeded": lambda model: torch.manual_seed(3).initial_seed(),
    "value of a tensor": lambda model: float(model.average.sum()) + 1,
    "buffer in place": _in_place,
    "buffer under no_grad": _under_no_grad,
    "buffer rebound": _rebound,
    "autocast off": _without_autocast,
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """One DenseNet and the way it is trained. Its `repr` is all that is needed to see a failure again."""

    dimensions: int = 2
    style: str = "list"
    concat: str = "cat(x, 1)"
    layers: tuple[int, ...] = (3,)
    growth: int = 3
    stem: int = 4
    size: int = 4
    norm: str = "batch"
    activation: str = "ReLU(inplace)"
    bottleneck: int = 0
    kernel: int = 3
    groups: bool = False
    bias: bool = False
    padding_mode: str = "zeros"
    dropout: str = "none"
    extra: str = "none"
    bare_first: bool = False
    returns_list: bool = False
    transition: str = "pool"
    head: str = "classifier"
    mode: str = "train"
    frozen_stem: bool = False
    channels_last: bool = False
    amp: bool = False
    level: str = "layer"
    batch: int = 2
    effect: str = "none"

    @property
    def grows(self) -> bool:
        """Layers hand on one growing tensor, not their new feature."""
        return self.style in ("growing", "prepended", "sandwich")

    def inputs(self, batch: int) -> Tensor:
        """A batch for the model."""
        x = torch.randn(batch, 2, *[self.size] * self.dimensions)
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x

    def make(self) -> "DenseNet":
        """The model in its mode."""
        model = DenseNet(self).train(self.mode != "eval")
        if self.channels_last:
            model = model.to(memory_format=torch.channels_last)
        if self.mode == "frozen norms":
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._NormBase):
                    module.eval().requires_grad_(False)
        elif self.mode == "frozen affine":
            for name, parameter in model.named_parameters():
                parameter.requires_grad_("norm" not in name)
        elif self.mode == "one norm frozen":
            norm = next((m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)), None)
            if norm is not None:
                norm.eval()
        if self.frozen_stem:
            model.stem.requires_grad_(False)
        return model


class FunctionalBatchNorm(nn.Module):
    """A norm that is no `_BatchNorm`: parameters and buffers of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, momentum=0.2, eps=1e-4
        )


def _norm(recipe: Recipe, channels: int, size: int) -> nn.Module:
    batch_norm, instance_norm = _BATCH_NORM[recipe.dimensions], _INSTANCE_NORM[recipe.dimensions]
    makers: dict[str, Callable[[], nn.Module]] = {
        "batch": lambda: batch_norm(channels),
        "batch, not affine": lambda: batch_norm(channels, affine=False),
        "batch, no statistics": lambda: batch_norm(channels, track_running_stats=False),
        "batch, cumulative": lambda: batch_norm(channels, momentum=None),
        "batch, slow": lambda: batch_norm(channels, momentum=0.01, eps=1e-3),
        "batch, functional": lambda: FunctionalBatchNorm(channels),
        "group": lambda: nn.GroupNorm(math.gcd(channels, 4), channels),
        "group, not affine": lambda: nn.GroupNorm(1, channels, affine=False),
        "instance": lambda: instance_norm(channels),
        "instance, affine": lambda: instance_norm(channels, affine=True),
        "layer": lambda: nn.LayerNorm([channels, *[size] * recipe.dimensions]),
    }
    return makers[recipe.norm]()


def _conv(recipe: Recipe, fan_in: int, fan_out: int, kernel: int) -> nn.Module:
    return _CONV[recipe.dimensions](
        fan_in,
        fan_out,
        kernel,
        padding=kernel // 2,
        groups=math.gcd(fan_in, fan_out) if recipe.groups else 1,
        bias=recipe.bias,
        padding_mode=recipe.padding_mode,
    )


class Squeeze(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gate = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.sigmoid(self.gate(x.flatten(2).mean(2)))
        return x * scale.reshape(*scale.shape, *[1] * (x.dim() - 2))


class Layer(nn.Module):
    """Norm, activation, convolution (twice with a bottleneck), dropout, and whatever else the recipe asks for."""

    def __init__(self, recipe: Recipe, channels: int, size: int, shared: nn.Module | None) -> None:
        super().__init__()
        self.recipe = recipe
        width = recipe.bottleneck * recipe.growth or channels
        make_activation = ACTIVATIONS[recipe.activation]
        self.norm1 = _norm(recipe, channels, size)
        self.act1 = shared or make_activation()
        if recipe.bottleneck:
            self.conv1 = _conv(recipe, channels, width, 1)
            self.norm2 = _norm(recipe, width, size)
            self.act2 = shared or make_activation()
        self.conv2 = _conv(recipe, width, recipe.growth, recipe.kernel)
        dropout = _CHANNEL_DROPOUT[recipe.dimensions] if recipe.dropout == "channels" else nn.Dropout
        used = recipe.dropout not in ("none", "functional")
        self.dropout = dropout(0.3, inplace=recipe.dropout == "in place") if used else None
        if recipe.extra == "second norm":
            self.other_norm, self.other_conv = _norm(recipe, channels, size), _conv(recipe, channels, recipe.growth, 1)
        if recipe.extra.startswith("squeeze"):
            self.squeeze = Squeeze(channels if recipe.extra == "squeeze before norm" else recipe.growth)
        if recipe.extra == "shuffle":
            self.register_buffer("order", torch.randperm(channels))

    def forward(self, x: Tensor, skips: list[Tensor]) -> Tensor:
        recipe, joined = self.recipe, x
        if recipe.extra == "squeeze before norm":
            x = self.squeeze(x)
        if recipe.extra == "shuffle":
            x = x.index_select(1, self.order)
        x = self.act1(self.norm1(x))
        if recipe.extra == "skip":
            skips.append(x)
        if recipe.bottleneck:
            x = self.act2(self.norm2(self.conv1(x)))
        new = self.conv2(x)
        if recipe.extra == "second norm":
            new = new + self.other_conv(self.other_norm(joined))
        if recipe.extra == "activated feature":
            new = F.relu_(new)
        if recipe.dropout == "functional":
            new = F.dropout(new, 0.2, training=self.training)
        elif self.dropout is not None:
            new = self.dropout(new)
        return self.squeeze(new) if recipe.extra == "squeeze on feature" else new


class Block(nn.ModuleList):
    """Layers that each read everything before them."""

    def __init__(self, recipe: Recipe, count: int, channels: int, size: int) -> None:
        step = recipe.growth * (2 if recipe.style == "sandwich" else 1)
        shared = ACTIVATIONS[recipe.activation]() if recipe.extra == "shared activation" else None
        super().__init__(Layer(recipe, channels + i * step, size, shared) for i in range(count))
        for layer in self if recipe.bottleneck else ():
            layer.norm2 = self[0].norm2 if recipe.extra == "shared norm" else layer.norm2
            layer.conv2 = self[0].conv2 if recipe.extra == "shared convolution" else layer.conv2
        self.recipe = recipe
        self.channels = channels + count * step

    def forward(self, x: Tensor, skips: list[Tensor]) -> Tensor | list[Tensor]:
        concat = CONCATS[self.recipe.concat]
        return self._growing(x, skips, concat) if self.recipe.grows else self._listed(x, skips, concat)

    def _growing(self, x: Tensor, skips: list[Tensor], concat: Concat) -> Tensor:
        for layer in self:
            new = layer(x, skips)
            x = concat({"growing": [x, new], "prepended": [new, x], "sandwich": [new, x, new]}[self.recipe.style])
        return x

    def _listed(self, x: Tensor, skips: list[Tensor], concat: Concat) -> Tensor | list[Tensor]:
        features: Any = [x] if self.recipe.style == "list" else (x,)
        for number, layer in enumerate(self):
            joined = x if self.recipe.bare_first and number == 0 else concat(features)
            if self.recipe.extra == "late in place" and number == 2:
                features[1].mul_(0.5)
            new = layer(joined, skips)
            features = [*features, new] if self.recipe.style == "list" else (*features, new)
        return list(features) if self.recipe.returns_list else concat(features)


class DenseNet(nn.Module):
    """Stem, dense blocks, transitions, head."""

    shared = 0.0

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.stem = _conv(recipe, 2, recipe.stem, 3)
        self.blocks, self.transitions = nn.ModuleList(), nn.ModuleList()
        channels, size = recipe.stem, recipe.size
        for number, count in enumerate(recipe.layers):
            block = Block(recipe, count, channels, size)
            self.blocks.append(block)
            channels = block.channels
            if number + 1 < len(recipe.layers):
                transition, channels, size = self._transition(channels, size)
                self.transitions.append(transition)
        self._steps = 0.0
        self.settings, self.table = _Settings(), {"rates": [1.0]}
        self.generator, self.numpy_generator = random.Random(0), numpy.random.default_rng(0)
        if recipe.effect == "iterator":
            self.schedule: Any = itertools.count(1.0, 0.5)
        self.register_buffer("average", torch.ones(1))
        self.norm = _norm(recipe, channels, size)
        self.classifier = nn.Linear(channels, 3)

    def _transition(self, channels: int, size: int) -> tuple[nn.Module, int, int]:
        recipe = self.recipe
        if recipe.transition == "none":
            return nn.Identity(), channels, size
        kept = max(1, channels // 2)
        parts = [_norm(recipe, channels, size), nn.ReLU(inplace=True), _conv(recipe, channels, kept, 1)]
        if recipe.transition == "pool":
            parts.append(_POOL[recipe.dimensions](2))
            size //= 2
        return nn.Sequential(*parts), kept, size

    def forward(self, x: Tensor) -> Any:
        concat = CONCATS[self.recipe.concat]
        skips: list[Tensor] = []
        x = self.stem(x)
        if self.recipe.effect != "none":
            x = x * EFFECTS[self.recipe.effect](self)
        for number, block in enumerate(self.blocks):
            out = block(x, skips)
            x = concat(out) if isinstance(out, list) else out
            if number < len(self.transitions):
                x = self.transitions[number](x)
        if self.recipe.head == "features":
            return {"last": self.norm(x), "raw": x, "skips": skips}
        pooled = F.relu(self.norm(x)).flatten(2).mean(2)
        logits = self.classifier(pooled)
        return (logits, skips) if skips else logits

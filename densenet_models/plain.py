"""The first DenseNet: 3x3 convolutions only, no bottleneck, no compression.

Huang, Liu, van der Maaten, Weinberger: Densely Connected Convolutional Networks, arXiv 1608.06993, the rows
"DenseNet" of table 2; layer order, dropout and the stem's sixteen channels follow the authors' Lua release.

A layer is an `nn.Sequential` whose forward concatenates its input with what the sequence makes of it.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class DenseLayer(nn.Sequential):
    """Norm, ReLU, 3x3 convolution, dropout if any; returns the input with the result attached.

    Args:
        in_channels: channels read.
        growth_rate: channels made.
        drop_rate: share of the new channels' elements set to zero in training; 0 adds no dropout module.
    """

    def __init__(self, in_channels: int, growth_rate: int, drop_rate: float) -> None:
        super().__init__(
            nn.BatchNorm2d(in_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(in_channels, growth_rate, kernel_size=3, padding=1, bias=False),
        )
        if drop_rate > 0:
            self.append(nn.Dropout(drop_rate))

    def forward(self, input: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, in_channels + growth_rate, H, W)."""
        new = input
        for module in self:
            new = module(new)
        return torch.cat([input, new], 1)


class DenseNet(nn.Sequential):
    """DenseNet without bottlenecks. Without arguments: depth 40, growth rate 12, 36 layers, 32x32 images.

    Called with images (N, in_channels, H, W), floating point, it returns logits (N, num_classes).

    Args:
        growth_rate: channels each layer adds (k in the paper).
        block_config: layers in each dense block.
        depth: count of convolutions and the classifier, 3n + 4; makes three blocks of n layers, whatever
            `block_config` says.
        num_init_features: channels of the stem.
        drop_rate: share of the elements set to zero in training after every convolution but the first,
            0 ≤ rate < 1 (the paper uses 0.2 where it does not augment the data).
        num_classes: outputs of the classifier.
        in_channels: channels of the images.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        growth_rate: int = 12,
        block_config: Sequence[int] = (12, 12, 12),
        *,
        depth: int | None = None,
        num_init_features: int = 16,
        drop_rate: float = 0.0,
        num_classes: int = 10,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        counts = {
            "growth_rate": growth_rate,
            "num_init_features": num_init_features,
            "num_classes": num_classes,
            "in_channels": in_channels,
        }
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"{name} is {count}. Use a positive whole number.")
        if not 0 <= drop_rate < 1:
            raise ValueError(f"drop_rate is {drop_rate}. Use a share from 0 up to, but not including, 1.")
        blocks = tuple(block_config) if depth is None else _three_blocks(depth)
        if not blocks or min(blocks) < 1:
            raise ValueError(f"block_config is {blocks}. Give one or more blocks of one or more layers.")

        self.add_module("stem", nn.Conv2d(in_channels, num_init_features, kernel_size=3, padding=1, bias=False))
        channels = num_init_features
        for number, num_layers in enumerate(blocks, start=1):
            widths = range(channels, channels + num_layers * growth_rate, growth_rate)
            layers = [DenseLayer(width, growth_rate, drop_rate) for width in widths]
            self.add_module(f"block{number}", nn.Sequential(*layers))
            channels += num_layers * growth_rate
            if number < len(blocks):
                self.add_module(f"transition{number}", _transition(channels, drop_rate))
        self.add_module("norm", nn.BatchNorm2d(channels))
        self.add_module("relu", nn.ReLU(inplace=True))
        self.add_module("pool", nn.AdaptiveAvgPool2d(1))
        self.add_module("flatten", nn.Flatten())
        self.add_module("classifier", nn.Linear(channels, num_classes))
        self.apply(_init_weights)


def _three_blocks(depth: int) -> tuple[int, int, int]:
    if depth < 7 or depth % 3 != 1:
        raise ValueError(f"depth is {depth}, not 3n + 4 with n ≥ 1. Use 7, 10, 13, 40, 100, … or block_config.")
    layers = (depth - 4) // 3
    return layers, layers, layers


def _transition(channels: int, drop_rate: float) -> nn.Sequential:
    """Norm, ReLU, 1x1 convolution, dropout if any, pooling: (N, C, H, W) to (N, C, H // 2, W // 2)."""
    transition = nn.Sequential(
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels, channels, kernel_size=1, bias=False),
    )
    if drop_rate > 0:
        transition.append(nn.Dropout(drop_rate))
    return transition.append(nn.AvgPool2d(2))


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        # The Lua release draws from N(0, 2 / (k²·C_out)).
        fan_out = math.prod(module.kernel_size) * module.out_channels
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
    elif isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)

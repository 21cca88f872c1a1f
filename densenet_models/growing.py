"""DenseNet-BC with a tensor that grows: every layer returns its input with the new channels attached.

Huang, Liu, van der Maaten, Weinberger: Densely Connected Convolutional Networks, arXiv 1608.06993, for 32x32
images; layer order and sizes follow the authors' Lua release.

This is the commonest way to write it: pairwise concatenation inside a layer, blocks that are `nn.Sequential`,
functional ReLU. A block's first layer has no concatenation before it.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Bottleneck(nn.Module):
    """A layer that returns what it read and what it made, as one tensor.

    Args:
        in_channels: channels read.
        growth_rate: channels made.
        bn_size: the 1x1 convolution makes `bn_size * growth_rate` channels.
        drop_rate: share of the new channels' elements set to zero in training, 0 ≤ rate < 1.
        prepend: put the new channels before the old ones.
    """

    def __init__(self, in_channels: int, growth_rate: int, bn_size: int, drop_rate: float, prepend: bool) -> None:
        super().__init__()
        width = bn_size * growth_rate
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, width, kernel_size=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, growth_rate, kernel_size=3, padding=1, bias=False)
        self.drop_rate = drop_rate
        self.prepend = prepend

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, in_channels + growth_rate, H, W)."""
        new = self.conv1(F.relu(self.bn1(x)))
        new = self.conv2(F.relu(self.bn2(new)))
        if self.drop_rate > 0:
            new = F.dropout(new, p=self.drop_rate, training=self.training)
        if self.prepend:
            return torch.cat([new, x], 1)
        return torch.cat([x, new], 1)


class Transition(nn.Module):
    """Norm, ReLU, 1x1 convolution, 2x2 average pooling.

    Args:
        in_channels: channels read.
        out_channels: channels made.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(in_channels)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H // 2, W // 2)."""
        return F.avg_pool2d(self.conv(F.relu(self.bn(x))), 2)


class DenseNet(nn.Module):
    """DenseNet-BC with pairwise concatenation. Without arguments: depth 40, growth rate 12, 18 dense layers.

    Args:
        growth_rate: channels each layer adds (k in the paper).
        block_config: layers in each dense block.
        depth: count of convolutions and the classifier, 6n + 4; makes three blocks of n layers, whatever
            `block_config` says.
        compression: share of the channels a transition keeps, 0 < share ≤ 1 (θ in the paper).
        num_init_features: channels of the stem; None is two growth rates, as in the paper.
        bn_size: width of the bottlenecks, in growth rates.
        drop_rate: share of each layer's new elements set to zero in training, 0 ≤ rate < 1.
        num_classes: outputs of the classifier.
        in_channels: channels of the images.
        prepend: concatenate `[new, x]` instead of `[x, new]`.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        growth_rate: int = 12,
        block_config: Sequence[int] = (6, 6, 6),
        *,
        depth: int | None = None,
        compression: float = 0.5,
        num_init_features: int | None = None,
        bn_size: int = 4,
        drop_rate: float = 0.0,
        num_classes: int = 10,
        in_channels: int = 3,
        prepend: bool = False,
    ) -> None:
        super().__init__()
        if depth is not None:
            if depth < 10 or depth % 6 != 4:
                raise ValueError(f"depth is {depth}, not 6n + 4 with n ≥ 1. Use 10, 16, 22, 40, 100, …")
            block_config = ((depth - 4) // 6,) * 3
        if num_init_features is None:
            num_init_features = 2 * growth_rate
        for name, count in {
            "growth_rate": growth_rate,
            "num_init_features": num_init_features,
            "bn_size": bn_size,
            "num_classes": num_classes,
            "in_channels": in_channels,
        }.items():
            if count < 1:
                raise ValueError(f"{name} is {count}. Use a positive whole number.")
        if not block_config or min(block_config) < 1:
            raise ValueError(f"block_config is {tuple(block_config)}. Give blocks of one or more layers.")
        if not 0 <= drop_rate < 1:
            raise ValueError(f"drop_rate is {drop_rate}. Use a share from 0 up to, but not including, 1.")
        if not 0 < compression <= 1:
            raise ValueError(f"compression is {compression}. Use a share above 0 and up to 1.")

        self.conv1 = nn.Conv2d(in_channels, num_init_features, kernel_size=3, padding=1, bias=False)
        self.stages = nn.Sequential()
        channels = num_init_features
        for number, num_layers in enumerate(block_config, start=1):
            block = nn.Sequential()
            for layer in range(num_layers):
                block.add_module(f"layer{layer + 1}", Bottleneck(channels, growth_rate, bn_size, drop_rate, prepend))
                channels += growth_rate
            self.stages.add_module(f"dense{number}", block)
            if number < len(block_config):
                kept = max(1, math.floor(channels * compression))
                self.stages.add_module(f"trans{number}", Transition(channels, kept))
                channels = kept
        self.bn = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images.

        Args:
            x: (N, in_channels, H, W), floating point.

        Returns:
            Logits, (N, num_classes).
        """
        out = self.stages(self.conv1(x))
        out = F.relu(self.bn(out))
        out = F.adaptive_avg_pool2d(out, 1).flatten(1)
        logits: Tensor = self.fc(out)
        return logits

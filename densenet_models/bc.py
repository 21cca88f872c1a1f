"""DenseNet-BC: dense blocks of bottleneck layers, transitions that compress.

Huang, Liu, van der Maaten, Weinberger: Densely Connected Convolutional Networks, arXiv 1608.06993. Layer
order and sizes follow the authors' Lua release; the ImageNet variants have torchvision's parameter names and
shapes, so that its weights can be loaded.

Every layer is given the list of all earlier features and concatenates them itself.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import TypedDict, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DenseLayer(nn.Module):
    """Concat, norm, ReLU, 1x1 convolution, norm, ReLU, 3x3 convolution, dropout.

    Args:
        in_channels: channels of all earlier features together.
        growth_rate: channels of the new feature.
        bn_size: the 1x1 convolution makes `bn_size * growth_rate` channels.
        drop_rate: share of the new feature's elements set to zero in training, 0 ≤ rate < 1.
    """

    def __init__(self, in_channels: int, growth_rate: int, bn_size: int, drop_rate: float) -> None:
        super().__init__()
        width = bn_size * growth_rate
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(in_channels, width, kernel_size=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, growth_rate, kernel_size=3, padding=1, bias=False)
        self.drop_rate = drop_rate

    def forward(self, features: list[Tensor]) -> Tensor:
        """Compute one new feature.

        Args:
            features: earlier features, (N, C_i, H, W) each.

        Returns:
            The new feature, (N, growth_rate, H, W).
        """
        x = torch.cat(features, 1)
        x = self.conv1(self.relu1(self.norm1(x)))
        new: Tensor = self.conv2(self.relu2(self.norm2(x)))
        if self.drop_rate > 0:
            new = F.dropout(new, p=self.drop_rate, training=self.training)
        return new


class DenseBlock(nn.Module):
    """Layers that each read everything before them.

    Args:
        num_layers: how many.
        in_channels: channels of the block's input.
        growth_rate: channels each layer adds.
        bn_size: see `DenseLayer`.
        drop_rate: see `DenseLayer`.
    """

    def __init__(self, num_layers: int, in_channels: int, growth_rate: int, bn_size: int, drop_rate: float) -> None:
        super().__init__()
        for i in range(num_layers):
            layer = DenseLayer(in_channels + i * growth_rate, growth_rate, bn_size, drop_rate)
            self.add_module(f"denselayer{i + 1}", layer)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, in_channels + num_layers * growth_rate, H, W)."""
        features = [x]
        for layer in self.children():
            features.append(layer(features))
        return torch.cat(features, 1)


class Transition(nn.Module):
    """Norm, ReLU, 1x1 convolution, 2x2 average pooling.

    Args:
        in_channels: channels read.
        out_channels: channels made.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(in_channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False)
        self.pool = nn.AvgPool2d(kernel_size=2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H // 2, W // 2)."""
        out: Tensor = self.pool(self.conv(self.relu(self.norm(x))))
        return out


class DenseNet(nn.Module):
    """DenseNet-BC. Without arguments: DenseNet-BC-100 with growth rate 12 for 32x32 images, 48 dense layers.

    Args:
        growth_rate: channels each layer adds (k in the paper).
        block_config: layers in each dense block.
        depth: count of convolutions and the classifier, 6n + 4; makes three blocks of n layers, whatever
            `block_config` says.
        compression: share of the channels a transition keeps, 0 < share ≤ 1 (θ in the paper).
        num_init_features: channels of the stem.
        bn_size: width of the bottlenecks, in growth rates.
        drop_rate: share of each new feature's elements set to zero in training, 0 ≤ rate < 1.
        num_classes: outputs of the classifier.
        in_channels: channels of the images.
        small_inputs: stem of one 3x3 convolution at full size (32x32 images). If False the ImageNet stem: 7x7
            convolution with stride 2, norm, ReLU, 3x3 max pooling with stride 2.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        growth_rate: int = 12,
        block_config: Sequence[int] = (16, 16, 16),
        *,
        depth: int | None = None,
        compression: float = 0.5,
        num_init_features: int = 24,
        bn_size: int = 4,
        drop_rate: float = 0.0,
        num_classes: int = 10,
        in_channels: int = 3,
        small_inputs: bool = True,
    ) -> None:
        super().__init__()
        _require_positive(
            growth_rate=growth_rate,
            num_init_features=num_init_features,
            bn_size=bn_size,
            num_classes=num_classes,
            in_channels=in_channels,
        )
        if not 0 < compression <= 1:
            raise ValueError(f"compression is {compression}. Use a share above 0 and up to 1.")
        if not 0 <= drop_rate < 1:
            raise ValueError(f"drop_rate is {drop_rate}. Use a share from 0 up to, but not including, 1.")
        blocks = _block_sizes(block_config, depth)

        self.features = nn.Sequential(_stem(in_channels, num_init_features, small_inputs))
        channels = num_init_features
        for number, num_layers in enumerate(blocks, start=1):
            block = DenseBlock(num_layers, channels, growth_rate, bn_size, drop_rate)
            self.features.add_module(f"denseblock{number}", block)
            channels += num_layers * growth_rate
            if number < len(blocks):
                kept = _compressed(channels, compression)
                self.features.add_module(f"transition{number}", Transition(channels, kept))
                channels = kept
        self.features.add_module(f"norm{len(blocks) + 1}", nn.BatchNorm2d(channels))
        self.classifier = nn.Linear(channels, num_classes)
        self.apply(_init_weights)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images.

        Args:
            x: (N, in_channels, H, W), floating point.

        Returns:
            Logits, (N, num_classes).
        """
        x = F.relu(self.features(x), inplace=True)
        x = F.adaptive_avg_pool2d(x, (1, 1))
        logits: Tensor = self.classifier(torch.flatten(x, 1))
        return logits


class Options(TypedDict, total=False):
    """Keyword arguments of `DenseNet`; an ImageNet variant takes any of them over its own."""

    growth_rate: int
    block_config: Sequence[int]
    depth: int | None
    compression: float
    num_init_features: int
    bn_size: int
    drop_rate: float
    num_classes: int
    in_channels: int
    small_inputs: bool


def densenet121(**options: Unpack[Options]) -> DenseNet:
    """DenseNet-121 for ImageNet: 7,978,856 parameters. `options` as of `DenseNet`."""
    return _imagenet((6, 12, 24, 16), 32, 64, options)


def densenet169(**options: Unpack[Options]) -> DenseNet:
    """DenseNet-169 for ImageNet: 14,149,480 parameters. `options` as of `DenseNet`."""
    return _imagenet((6, 12, 32, 32), 32, 64, options)


def densenet201(**options: Unpack[Options]) -> DenseNet:
    """DenseNet-201 for ImageNet: 20,013,928 parameters. `options` as of `DenseNet`."""
    return _imagenet((6, 12, 48, 32), 32, 64, options)


def densenet161(**options: Unpack[Options]) -> DenseNet:
    """DenseNet-161 for ImageNet, growth rate 48: 28,681,000 parameters. `options` as of `DenseNet`."""
    return _imagenet((6, 12, 36, 24), 48, 96, options)


def densenet264(**options: Unpack[Options]) -> DenseNet:
    """DenseNet-264 for ImageNet: 33,337,704 parameters. `options` as of `DenseNet`."""
    return _imagenet((6, 12, 64, 48), 32, 64, options)


def _imagenet(block_config: Sequence[int], growth_rate: int, num_init_features: int, options: Options) -> DenseNet:
    published: Options = {
        "growth_rate": growth_rate,
        "block_config": block_config,
        "num_init_features": num_init_features,
        "num_classes": 1000,
        "small_inputs": False,
    }
    return DenseNet(**(published | options))


def _stem(in_channels: int, out_channels: int, small_inputs: bool) -> OrderedDict[str, nn.Module]:
    if small_inputs:
        conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False)
        return OrderedDict(conv0=conv)
    return OrderedDict(
        conv0=nn.Conv2d(in_channels, out_channels, kernel_size=7, stride=2, padding=3, bias=False),
        norm0=nn.BatchNorm2d(out_channels),
        relu0=nn.ReLU(inplace=True),
        pool0=nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
    )


def _block_sizes(block_config: Sequence[int], depth: int | None) -> tuple[int, ...]:
    if depth is not None:
        if depth < 10 or depth % 6 != 4:
            raise ValueError(
                f"depth is {depth}, not 6n + 4 with n ≥ 1 layers a block. Use 10, 16, 22, 40, 100, … or block_config."
            )
        return ((depth - 4) // 6,) * 3
    if not block_config or min(block_config) < 1:
        raise ValueError(f"block_config is {tuple(block_config)}. Give one or more blocks of one or more layers.")
    return tuple(block_config)


def _compressed(channels: int, compression: float) -> int:
    kept = int(channels * compression)
    if kept < 1:
        raise ValueError(f"compression {compression} leaves none of a transition's {channels} channels. Raise it.")
    return kept


def _require_positive(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} is {count}. Use a positive whole number.")


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)

"""A 3-D DenseNet for volumes such as CT scans.

Huang, Liu, van der Maaten, Weinberger: Densely Connected Convolutional Networks, arXiv 1608.06993, with the
ImageNet layout in three dimensions, as medical imaging libraries (MONAI among them) have it.

A layer holds its operations in one `nn.Sequential`, dropout as a module, and concatenates by keyword.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class DenseLayer(nn.Module):
    """Norm, ReLU, 1x1x1 convolution, norm, ReLU, 3x3x3 convolution, dropout; returns input and result.

    Args:
        in_channels: channels read.
        growth_rate: channels made.
        bn_size: the 1x1x1 convolution makes `bn_size * growth_rate` channels.
        drop_rate: share of the new channels' elements set to zero in training; 0 adds no dropout module.
    """

    def __init__(self, in_channels: int, growth_rate: int, bn_size: int, drop_rate: float) -> None:
        super().__init__()
        width = bn_size * growth_rate
        self.layers = nn.Sequential()
        self.layers.add_module("norm1", nn.BatchNorm3d(in_channels))
        self.layers.add_module("relu1", nn.ReLU(inplace=True))
        self.layers.add_module("conv1", nn.Conv3d(in_channels, width, kernel_size=1, bias=False))
        self.layers.add_module("norm2", nn.BatchNorm3d(width))
        self.layers.add_module("relu2", nn.ReLU(inplace=True))
        self.layers.add_module("conv2", nn.Conv3d(width, growth_rate, kernel_size=3, padding=1, bias=False))
        if drop_rate > 0:
            self.layers.add_module("dropout", nn.Dropout(drop_rate))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, D, H, W) to (N, in_channels + growth_rate, D, H, W)."""
        return torch.cat((x, self.layers(x)), dim=1)


class DenseNet(nn.Module):
    """3-D DenseNet-BC. Without arguments: three blocks of four layers, growth rate 8, 106,546 parameters.

    That default is small on purpose: a training step on two volumes of 32x32x32 takes well under a second
    without a GPU. DenseNet-121 is `DenseNet(32, (6, 12, 24, 16), num_init_features=64)`.

    Args:
        growth_rate: channels each layer adds (k in the paper).
        block_config: layers in each dense block.
        compression: share of the channels a transition keeps, 0 < share ≤ 1 (θ in the paper).
        num_init_features: channels of the stem.
        bn_size: width of the bottlenecks, in growth rates.
        drop_rate: share of each layer's new elements set to zero in training, 0 ≤ rate < 1.
        num_classes: outputs of the classifier.
        in_channels: channels of the volumes; 1 for CT.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        growth_rate: int = 8,
        block_config: Sequence[int] = (4, 4, 4),
        *,
        compression: float = 0.5,
        num_init_features: int = 16,
        bn_size: int = 4,
        drop_rate: float = 0.0,
        num_classes: int = 2,
        in_channels: int = 1,
    ) -> None:
        super().__init__()
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
        if not 0 < compression <= 1:
            raise ValueError(f"compression is {compression}. Use a share above 0 and up to 1.")
        if not 0 <= drop_rate < 1:
            raise ValueError(f"drop_rate is {drop_rate}. Use a share from 0 up to, but not including, 1.")

        self.features = nn.Sequential(
            nn.Conv3d(in_channels, num_init_features, kernel_size=7, stride=2, padding=3, bias=False),
            nn.BatchNorm3d(num_init_features),
            nn.ReLU(inplace=True),
            nn.MaxPool3d(kernel_size=3, stride=2, padding=1),
        )
        channels = num_init_features
        for number, num_layers in enumerate(block_config, start=1):
            layers = []
            for _ in range(num_layers):
                layers.append(DenseLayer(channels, growth_rate, bn_size, drop_rate))
                channels += growth_rate
            self.features.append(nn.Sequential(*layers))
            if number < len(block_config):
                kept = max(1, int(channels * compression))
                self.features.append(_transition(channels, kept))
                channels = kept
        self.features.append(nn.BatchNorm3d(channels))

        self.class_layers = nn.Sequential(
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool3d(1),
            nn.Flatten(1),
            nn.Linear(channels, num_classes),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight)
            elif isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Classify volumes.

        Args:
            x: (N, in_channels, D, H, W), floating point; each side of at least 13 voxels for three blocks:
                the stem quarters it, rounding up, and every transition halves it.

        Returns:
            Logits, (N, num_classes).
        """
        logits: Tensor = self.class_layers(self.features(x))
        return logits


def _transition(in_channels: int, out_channels: int) -> nn.Sequential:
    """Norm, ReLU, 1x1x1 convolution, 2x2x2 average pooling: (N, C, D, H, W) to half of each side."""
    return nn.Sequential(
        nn.BatchNorm3d(in_channels),
        nn.ReLU(inplace=True),
        nn.Conv3d(in_channels, out_channels, kernel_size=1, bias=False),
        nn.AvgPool3d(kernel_size=2, stride=2),
    )

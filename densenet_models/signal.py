"""A 1-D DenseNet for electrocardiograms.

Huang, Liu, van der Maaten, Weinberger: Densely Connected Convolutional Networks, arXiv 1608.06993, in one
dimension. Twelve leads in; the five classes out are the diagnostic superclasses of the PTB-XL recordings
(doi 10.1038/s41597-020-0495-6).

A layer is called with every earlier feature as an argument of its own; its activations are tensor methods.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class DenseLayer(nn.Module):
    """Concat, norm, ReLU, convolution over 1 sample, norm, ReLU, convolution over `kernel_size`, dropout.

    Args:
        in_channels: channels of all earlier features together.
        growth_rate: channels of the new feature.
        bn_size: the first convolution makes `bn_size * growth_rate` channels.
        kernel_size: samples the second convolution sees; odd.
        drop_rate: share of the new feature's elements set to zero in training, 0 ≤ rate < 1.
    """

    def __init__(self, in_channels: int, growth_rate: int, bn_size: int, kernel_size: int, drop_rate: float) -> None:
        super().__init__()
        width = bn_size * growth_rate
        self.norm_in = nn.BatchNorm1d(in_channels)
        self.squeeze = nn.Conv1d(in_channels, width, 1, bias=False)
        self.norm_mid = nn.BatchNorm1d(width)
        self.conv = nn.Conv1d(width, growth_rate, kernel_size, padding=kernel_size // 2, bias=False)
        self.dropout = nn.Dropout(drop_rate)

    def forward(self, *features: Tensor) -> Tensor:
        """Compute one new feature, (N, growth_rate, T), of earlier ones, (N, C_i, T) each."""
        x = torch.concat(features, dim=1)
        x = self.squeeze(self.norm_in(x).relu())
        x = self.conv(self.norm_mid(x).relu())
        new: Tensor = self.dropout(x)
        return new


class DenseBlock(nn.ModuleList):
    """Layers that each read everything before them.

    Args:
        num_layers: how many.
        in_channels: channels of the block's input.
        growth_rate: channels each layer adds.
        bn_size: see `DenseLayer`.
        kernel_size: see `DenseLayer`.
        drop_rate: see `DenseLayer`.
    """

    def __init__(
        self,
        num_layers: int,
        in_channels: int,
        growth_rate: int,
        bn_size: int,
        kernel_size: int,
        drop_rate: float,
    ) -> None:
        super().__init__(
            DenseLayer(in_channels + i * growth_rate, growth_rate, bn_size, kernel_size, drop_rate)
            for i in range(num_layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, T) to (N, in_channels + num_layers * growth_rate, T)."""
        features: tuple[Tensor, ...] = (x,)
        for layer in self:
            features = (*features, layer(*features))
        return torch.concat(features, dim=1)


class Transition(nn.Module):
    """Norm, ReLU, convolution over one sample, average pooling of two samples.

    Args:
        in_channels: channels read.
        out_channels: channels made.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(in_channels)
        self.conv = nn.Conv1d(in_channels, out_channels, 1, bias=False)
        self.pool = nn.AvgPool1d(2)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, T) to (N, out_channels, T // 2)."""
        out: Tensor = self.pool(self.conv(self.norm(x).relu()))
        return out


class DenseNet(nn.Module):
    """1-D DenseNet-BC. Without arguments: three blocks of four layers, growth rate 16, 12 leads, 5 classes.

    Args:
        growth_rate: channels each layer adds (k in the paper).
        block_config: layers in each dense block.
        compression: share of the channels a transition keeps, 0 < share ≤ 1 (θ in the paper).
        num_init_features: channels of the stem.
        bn_size: width of the bottlenecks, in growth rates.
        kernel_size: samples a layer's convolution sees; odd.
        drop_rate: share of each new feature's elements set to zero in training, 0 ≤ rate < 1.
        num_classes: outputs of the classifier.
        in_channels: leads.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        growth_rate: int = 16,
        block_config: Sequence[int] = (4, 4, 4),
        *,
        compression: float = 0.5,
        num_init_features: int = 32,
        bn_size: int = 4,
        kernel_size: int = 7,
        drop_rate: float = 0.0,
        num_classes: int = 5,
        in_channels: int = 12,
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
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {kernel_size}. Use a positive odd number, so that lengths stay.")
        if not block_config or min(block_config) < 1:
            raise ValueError(f"block_config is {tuple(block_config)}. Give blocks of one or more layers.")
        if not 0 < compression <= 1:
            raise ValueError(f"compression is {compression}. Use a share above 0 and up to 1.")
        if not 0 <= drop_rate < 1:
            raise ValueError(f"drop_rate is {drop_rate}. Use a share from 0 up to, but not including, 1.")

        self.stem = nn.Conv1d(in_channels, num_init_features, 15, stride=2, padding=7, bias=False)
        self.stem_norm = nn.BatchNorm1d(num_init_features)
        self.stem_pool = nn.MaxPool1d(3, stride=2, padding=1)
        self.stages = nn.ModuleList()
        channels = num_init_features
        for number, num_layers in enumerate(block_config):
            if number > 0:
                kept = max(1, int(channels * compression))
                self.stages.append(Transition(channels, kept))
                channels = kept
            self.stages.append(DenseBlock(num_layers, channels, growth_rate, bn_size, kernel_size, drop_rate))
            channels += num_layers * growth_rate
        self.norm = nn.BatchNorm1d(channels)
        self.head = nn.Linear(channels, num_classes)

        for module in self.modules():
            if isinstance(module, nn.Conv1d):
                nn.init.kaiming_normal_(module.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Classify recordings.

        Args:
            x: (N, in_channels, T), T samples in time, at any rate; for instance T = 1000 for 10 s at 100 Hz.

        Returns:
            Logits, (N, num_classes).
        """
        x = self.stem_pool(self.stem_norm(self.stem(x)).relu())
        for stage in self.stages:
            x = stage(x)
        logits: Tensor = self.head(self.norm(x).relu().mean(dim=-1))
        return logits

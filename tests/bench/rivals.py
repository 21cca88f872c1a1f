"""The rival that memopt is measured beside: the same models with `torch.utils.checkpoint` written in by hand."""

import types

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from densenet_models import bc


def checkpointed(model: nn.Module) -> nn.Module:
    """Checkpoint concat, norm, ReLU and bottleneck convolution of every dense layer of a `bc.DenseNet`.

    What efficient_densenet_pytorch does (arXiv 1707.06990), on today's non-reentrant checkpoint.
    """
    for module in model.modules():
        if isinstance(module, bc.DenseLayer):
            module.forward = types.MethodType(_forward, module)
    return model


def _forward(layer: bc.DenseLayer, features: list[torch.Tensor]) -> torch.Tensor:
    def bottleneck(*inputs: torch.Tensor) -> torch.Tensor:
        return layer.conv1(layer.relu1(layer.norm1(torch.cat(inputs, 1))))

    narrow = checkpoint(bottleneck, *features, use_reentrant=False)
    new: torch.Tensor = layer.conv2(layer.relu2(layer.norm2(narrow)))
    return F.dropout(new, p=layer.drop_rate, training=layer.training) if layer.drop_rate > 0 else new

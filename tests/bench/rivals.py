"""The rivals that memopt is measured beside: checkpointing written in by hand, torch.compile, torchvision's own."""

import types

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from densenet_models import bc


def compiled_for_memory(model: nn.Module, budget: float = 0.0) -> nn.Module:
    """`torch.compile` with an `activation_memory_budget`: 0 recomputes all it can, 1 is its default."""
    import torch._functorch.config as settings

    compiled: nn.Module = torch.compile(model)

    class Budgeted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = compiled

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with settings.patch(activation_memory_budget=budget):
                result: torch.Tensor = self.inner(x)
            return result

    return Budgeted()


def torchvision_memory_efficient(model: nn.Module) -> nn.Module:
    """torchvision's densenet121 with its own checkpointing, in place of `model`."""
    from torchvision.models import densenet121

    made: nn.Module = densenet121(memory_efficient=True)
    first = next(model.parameters())
    return made.to(first.device, memory_format=_format_of(first))


def _format_of(weight: torch.Tensor) -> torch.memory_format:
    return torch.channels_last if weight.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format


def checkpointed(model: nn.Module) -> nn.Module:
    """Checkpoint concat, norm, ReLU and bottleneck convolution of every dense layer of a `bc.DenseNet`.

    What efficient_densenet_pytorch does (arXiv 1707.06990), on today's non-reentrant checkpoint.

    Raises:
        ValueError: it has none, as where its file was loaded by path and its classes are others.
    """
    layers = [module for module in model.modules() if isinstance(module, bc.DenseLayer)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no densenet_models.bc.DenseLayer: nothing would be checkpointed.")
    for layer in layers:
        layer.forward = types.MethodType(_forward, layer)
    return model


def _forward(layer: bc.DenseLayer, features: list[torch.Tensor]) -> torch.Tensor:
    def bottleneck(*inputs: torch.Tensor) -> torch.Tensor:
        return layer.conv1(layer.relu1(layer.norm1(torch.cat(inputs, 1))))

    narrow = checkpoint(bottleneck, *features, use_reentrant=False)
    new: torch.Tensor = layer.conv2(layer.relu2(layer.norm2(narrow)))
    return F.dropout(new, p=layer.drop_rate, training=layer.training) if layer.drop_rate > 0 else new

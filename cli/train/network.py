"""The model of a run: DenseNet-BC or what the user names, and whether it fits the data."""

from dataclasses import dataclass

import torch
from torch import nn

from densenet_models import bc
from memopt.measure.step import seeded

from ..errors import CommandError, describe
from ..target import Target, bind, load_target, parse_arguments
from .data import DataSet
from .settings import Settings

PROBE_IMAGES = 2
FEWEST_LAYERS = 10
"""Of a DenseNet-BC with three blocks alike."""


@dataclass(frozen=True, slots=True)
class Network:
    """A model that can be made again, the same at every call.

    Attributes:
        target: makes it.
        seed: of the initial weights.
        name: as it is printed.
    """

    target: Target
    seed: int
    name: str

    def make(self) -> nn.Module:
        """A fresh model on the CPU."""
        with seeded(self.seed, torch.device("cpu")):
            return self.target.make()


def find_network(settings: Settings, data: DataSet) -> Network:
    """Find the model.

    Raises:
        CommandError: there is none.
    """
    arguments = parse_arguments(settings.arg)
    if settings.model is None:
        if "block_config" not in arguments:
            _require_even_blocks(settings.depth)
        own = {"depth": settings.depth, "growth_rate": settings.growth_rate, "num_classes": data.classes}
        target = bind(bc.DenseNet, "DenseNet", bc.__file__, own | arguments)
        name = f"DenseNet-BC-{settings.depth} (k = {settings.growth_rate})"
    else:
        target = load_target(settings.model, arguments)
        name = settings.model
    return Network(target, settings.seed, name)


def _require_even_blocks(depth: int) -> None:
    if depth < FEWEST_LAYERS or (depth - FEWEST_LAYERS) % 6:
        below = max(FEWEST_LAYERS, depth - (depth - FEWEST_LAYERS) % 6)
        raise CommandError(f"--depth {depth} is not 6n + 4 with n ≥ 1 layers a block. Use {below} or {below + 6}.")


def require_classifier(network: Network, data: DataSet, channels: int) -> None:
    """Try the model on two images of so many channels.

    Raises:
        CommandError: it does not classify such images.
    """
    model = network.make()
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise CommandError(f"{network.name} has no parameter that requires a gradient: nothing to train.")
    shape = (PROBE_IMAGES, channels, data.size, data.size)
    try:
        with seeded(0, torch.device("cpu")), torch.no_grad():
            logits = model(torch.zeros(shape))
    except Exception as error:
        size, reason = "x".join(map(str, shape)), describe(error, network.target.file)
        raise CommandError(
            f"{network.name} refuses images of shape {size}: {reason}. Name a model for images of this shape."
        ) from error
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2 or logits.shape[0] != PROBE_IMAGES:
        raise CommandError(f"{network.name} does not return logits of shape (images, classes). Name a classifier.")
    if logits.shape[1] < data.classes:
        raise CommandError(
            f"{network.name} tells {logits.shape[1]} classes apart, and {data.name} have {data.classes}. Give it as "
            f"many, for example with --arg num_classes={data.classes}."
        )

"""What a run is: everything that its numbers depend on. Kept with it, and taken up again when it is resumed."""

import argparse
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from densenet_models.train import Recipe

from ..errors import CommandError
from ..options import AMP_DTYPES

AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Settings:
    """Options that define a run; each is named as the option is.

    Attributes:
        data: folder of images, absolute; None for the handwritten digits.
        image_size: height and width that images of a folder are brought to.
        valid_size: images kept from training for validation; None for a tenth.
        augment: "yes" or "no".
        model: TARGET, or None for DenseNet-BC.
        arg: arguments of the model's class or factory.
        depth: of DenseNet-BC.
        growth_rate: of DenseNet-BC.
        epochs: passes over the training images.
        batch_size: images a step over all processes.
        lr: learning rate of the first epoch.
        momentum: of SGD.
        weight_decay: of SGD.
        amp: autocast dtype, "bf16" or "fp16", or None.
        seed: of every random number.
    """

    data: str | None = None
    image_size: int = 32
    valid_size: int | None = None
    augment: str = "yes"
    model: str | None = None
    arg: tuple[str, ...] = ()
    depth: int = 40
    growth_rate: int = 12
    epochs: int = 300
    batch_size: int = 64
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    amp: str | None = None
    seed: int = 0

    @property
    def recipe(self) -> Recipe:
        """What the loop needs of it."""
        amp: torch.dtype | None = AMP_DTYPES.get(self.amp or "")
        return Recipe(self.epochs, self.lr, self.momentum, self.weight_decay, amp=amp, seed=self.seed)

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


DEFAULTS = Settings()


def new_settings(options: argparse.Namespace) -> Settings:
    """Settings of a new run; what was not given has its default. A batch size "auto" is still to be found.

    Raises:
        CommandError: options contradict each other.
    """
    given = _given(options)
    if "model" in given and (named := {"depth", "growth_rate"} & set(given)):
        option = sorted(named)[0].replace("_", "-")
        raise CommandError(f"--{option} is of the default model. With --model write --arg KEY=VALUE instead.")
    given.pop("batch_size", None) if given.get("batch_size") == AUTO else None
    return replace(DEFAULTS, **given)


def resumed_settings(options: argparse.Namespace, stored: dict[str, Any], place: str) -> Settings:
    """Settings of a run that goes on. Only the number of epochs may be another than it was.

    Args:
        options: as given now.
        stored: as the run was begun with.
        place: its folder, as the user named it.

    Raises:
        CommandError: an option contradicts what the run was begun with.
    """
    try:
        settings = Settings(**{**stored, "arg": tuple(stored["arg"])})
    except (TypeError, KeyError) as error:
        raise CommandError(f"{place} was written by another version of memopt ({error}). Begin a new run.") from error
    for name, value in _given(options).items():
        was = getattr(settings, name)
        if name != "epochs" and value not in (was, AUTO):
            option = f"--{name.replace('_', '-')}"
            raise CommandError(
                f"{place} was trained with {option} {_text(was)}, not {_text(value)}. Leave {option} out, or begin a "
                "new run with --save."
            )
    return replace(settings, epochs=options.epochs or settings.epochs)


def _given(options: argparse.Namespace) -> dict[str, Any]:
    values = {field.name: getattr(options, field.name) for field in fields(Settings)}
    given = {name: value for name, value in values.items() if value is not None and value != []}
    if "arg" in given:
        given["arg"] = tuple(given["arg"])
    if "data" in given:
        given["data"] = str(Path(given["data"]).absolute())
    return given


def _text(value: object) -> str:
    return " ".join(value) if isinstance(value, tuple) else "left out" if value is None else str(value)

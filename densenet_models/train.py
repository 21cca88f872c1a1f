"""Training a classifier as the DenseNet paper does (arXiv 1608.06993): SGD, the learning rate divided by ten twice.

It needs nothing but torch. `fit` is handed a model in a `Trainer` and functions that give batches; what the data are,
where results are kept and how the model saves memory is not its concern. In a process group every process calls `fit`
with its share of each batch; sums and decisions are agreed upon.

Nothing random is carried from step to step: the generators are seeded anew in each step, from the seed, the epoch, the
batch and the rank. Training that goes on from a saved state is therefore the training that was never interrupted.
"""

import hashlib
import math
import random
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

PADDING_LABEL = -100
"""Label of samples that only fill a batch up; they count for nothing."""
AGREE_EVERY = 10
"""Steps between two questions to the other processes whether one was told to stop: asking waits for the device."""

Batch = tuple[Tensor, Tensor]
"""Images (N, C, H, W) and labels (N,), on the model's device."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to train.

    Args:
        epochs: passes over the training data.
        learning_rate: of the first epoch.
        momentum: of SGD, Nesterov's.
        weight_decay: of all parameters.
        drops: shares of the epochs after which the learning rate is divided by ten.
        amp: autocast dtype or None. With float16 the loss is scaled.
        seed: of every random number.
    """

    epochs: int = 300
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    drops: tuple[float, ...] = (0.5, 0.75)
    amp: torch.dtype | None = None
    seed: int = 0

    def rate(self, epoch: int) -> float:
        """Learning rate of an epoch, counted from 0."""
        dropped = sum(epoch >= share * self.epochs for share in self.drops)
        return self.learning_rate / 10.0**dropped


@dataclass(frozen=True, slots=True)
class Score:
    """Mean cross-entropy, and the share of images that are classified wrongly."""

    loss: float
    error: float


@dataclass(frozen=True, slots=True)
class EpochResult:
    """What an epoch, counted from 1, came to. Scores of training are those seen while the weights changed."""

    epoch: int
    learning_rate: float
    train: Score
    valid: Score

    def as_dict(self) -> dict[str, Any]:
        """Plain values, from which `from_dict` makes the same result."""
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "EpochResult":
        """The inverse of `as_dict`."""
        return EpochResult(**{**values, "train": Score(**values["train"]), "valid": Score(**values["valid"])})


@dataclass(slots=True)
class Progress:
    """Where training has got to.

    Attributes:
        epoch: the present one, from 0.
        batch: batches of it that are done.
        sums: loss, errors and images of these batches, summed over this process (3,), float64.
        history: results of the epochs before.
    """

    epoch: int = 0
    batch: int = 0
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    history: list[EpochResult] = field(default_factory=list)


class DivergedError(ArithmeticError):
    """The loss is no longer a finite number."""


class Trainer:
    """A model, its optimiser and where training has got to.

    Args:
        model: holds the parameters; on its device.
        recipe: how to train.
        forward: what is called in training: the model wrapped or compiled; None for the model itself.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, forward: Callable[[Tensor], Tensor] | None = None) -> None:
        self.model = model
        self.recipe = recipe
        self.forward = forward or model
        self.device = next(model.parameters()).device
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # One kernel for all parameters takes little of the processor. There is none for those of FSDP2.
        plain = all(type(parameter) is nn.Parameter for parameter in parameters)
        self._fused = True if self.device.type == "cuda" and plain else None
        self.optimizer = torch.optim.SGD(
            parameters,
            lr=recipe.learning_rate,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            nesterov=recipe.momentum > 0,
            fused=self._fused,
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.amp is torch.float16)
        self.epoch = 0
        self.batch = 0
        self.history: list[EpochResult] = []
        self._sums = torch.zeros(3, dtype=torch.float64, device=self.device)

    def progress(self) -> Progress:
        """Where training has got to, the same on every process. A collective call in a process group."""
        return Progress(self.epoch, self.batch, _summed(self._sums).tolist(), list(self.history))

    def go_on_from(self, progress: Progress) -> None:
        """Take up where `progress` was taken; weights and the optimiser's state are the caller's to load."""
        self.epoch, self.batch, self.history = progress.epoch, progress.batch, list(progress.history)
        self._sums.zero_()
        if _rank() == 0:
            self._sums += torch.tensor(progress.sums, dtype=torch.float64, device=self.device)

    def train(
        self, batches: Iterable[Batch], on_step: Callable[[int], object], should_stop: Callable[[], bool]
    ) -> bool:
        """Train on what is left of the present epoch.

        Args:
            batches: of this epoch, from `self.batch` on.
            on_step: told the batches done.
            should_stop: asked after each step.

        Returns:
            Whether the epoch was finished; False when told to stop.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate(self.epoch)
            group["fused"] = self._fused  # a loaded state may be of another device
        self.model.train()
        for images, labels in batches:
            _seed(self.recipe.seed, self.epoch, self.batch, _rank())
            self._step(images, labels)
            self.batch += 1
            on_step(self.batch)
            if self._agreed(should_stop):
                return False
        return True

    def train_score(self) -> Score:
        """Score of the present epoch so far."""
        return _score(_summed(self._sums))

    def finish_epoch(self, valid: Score) -> EpochResult:
        """Note the epoch's result and begin the next."""
        result = EpochResult(self.epoch + 1, self.recipe.rate(self.epoch), self.train_score(), valid)
        self.history.append(result)
        self.epoch, self.batch = self.epoch + 1, 0
        self._sums.zero_()
        return result

    def _step(self, images: Tensor, labels: Tensor) -> None:
        with _autocast(self.device, self.recipe.amp):
            logits = self.forward(images)
        loss = F.cross_entropy(logits.float(), labels)
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            self._sums += _sums_of(logits.detach(), labels)

    def _agreed(self, should_stop: Callable[[], bool]) -> bool:
        if not dist.is_initialized():
            return should_stop()
        return self.batch % AGREE_EVERY == 0 and any_rank(should_stop(), self.device)


def fit(
    trainer: Trainer,
    training: Callable[[int, int], Iterable[Batch]],
    validation: Callable[[], Iterable[Batch]],
    *,
    on_step: Callable[[int], object] = lambda batch: None,
    on_epoch: Callable[[EpochResult], object] = lambda result: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Train from where the trainer is to the recipe's last epoch.

    Args:
        trainer: the model and how to train it.
        training: (epoch, first) to the batches of that epoch, from batch `first` on, each a process's share.
        validation: to the batches of the validation data.
        on_step: told the batches done in the epoch after each step.
        on_epoch: told the result of each epoch, when the trainer stands at the beginning of the next.
        should_stop: asked after each step and each epoch.

    Returns:
        Whether training is complete. False when told to stop; a later call goes on.

    Raises:
        DivergedError: the loss is not finite.
    """
    while trainer.epoch < trainer.recipe.epochs:
        if not trainer.train(training(trainer.epoch, trainer.batch), on_step, should_stop):
            return False
        if not math.isfinite(loss := trainer.train_score().loss):
            raise DivergedError(f"the loss is {loss} in epoch {trainer.epoch + 1}")
        take_buffers_of_first_rank(trainer.model)
        on_epoch(trainer.finish_epoch(evaluate(trainer.model, validation(), trainer.recipe.amp)))
        if any_rank(should_stop(), trainer.device):
            return trainer.epoch >= trainer.recipe.epochs
    return True


def evaluate(model: nn.Module, batches: Iterable[Batch], amp: torch.dtype | None = None) -> Score:
    """Score of a model in evaluation mode. A collective call in a process group, each with its share of the batches.

    Args:
        model: on the device of the batches; left in evaluation mode.
        batches: the last may be filled up with images labelled `PADDING_LABEL`, which count for nothing.
        amp: autocast dtype or None.
    """
    device = next(model.parameters()).device
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    model.eval()
    with torch.no_grad():
        for images, labels in batches:
            with _autocast(device, amp):
                logits = model(images)
            sums += _sums_of(logits, labels)
    return _score(_summed(sums))


def seed_of(*parts: object) -> int:
    """A seed that depends on every part, unlike sums of them the same for no two."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set in any process of the group. A collective call."""
    if not dist.is_initialized():
        return flag
    return bool(_summed(torch.tensor(float(flag), device=device)).item())


def take_buffers_of_first_rank(model: nn.Module) -> None:
    """Give every process the buffers (running statistics) of rank 0, which are the ones saved."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def _seed(*parts: object) -> None:
    seed = seed_of(*parts)
    random.seed(seed)
    torch.manual_seed(seed)


def _autocast(device: torch.device, amp: torch.dtype | None) -> AbstractContextManager[Any]:
    return nullcontext() if amp is None else torch.autocast(device.type, dtype=amp)


def _sums_of(logits: Tensor, labels: Tensor) -> Tensor:
    logits = logits.float()
    loss = F.cross_entropy(logits, labels, ignore_index=PADDING_LABEL, reduction="sum")
    counted = labels != PADDING_LABEL
    errors = ((logits.argmax(1) != labels) & counted).sum()
    return torch.stack([loss.double(), errors.double(), counted.sum().double()])


def _summed(tensor: Tensor) -> Tensor:
    if not dist.is_initialized():
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def _score(sums: Tensor) -> Score:
    loss, errors, images = sums.tolist()
    return Score(loss / max(images, 1.0), errors / max(images, 1.0))


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0

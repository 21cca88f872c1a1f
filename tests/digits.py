"""Training on the handwritten digits that come with the command, and judging whether two ways of it train the same."""

import hashlib
import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from memopt_cli.train import digits
from memopt_cli.train.batches import Batches, Share
from memopt_cli.train.data import DataSet, InMemory
from torch import nn

from densenet_models.train import Recipe, Score, Trainer, evaluate, fit
from memopt.measure.step import seeded

Change = Callable[[nn.Module], nn.Module]

T_99 = 4.604
"""Two-sided 99 % quantile of Student's t with 4 degrees of freedom: 5 seeds."""
F_99 = 10.97
"""99 % quantile of F with 5 and 5 degrees of freedom."""


@dataclass(frozen=True)
class Trained:
    """What a training run ended with.

    Attributes:
        train: score on the training images, in evaluation mode.
        test: on the test images.
        digest: of all weights and buffers.
    """

    train: Score
    test: Score
    digest: str


def small_digits(size: int, images: int) -> DataSet:
    """The digits, scaled down to `size`, and so many to train on."""
    data = digits.load()

    def part(whole: InMemory, count: int) -> InMemory:
        shrunk = F.adaptive_avg_pool2d(whole.images[:count].float(), size).round().to(torch.uint8)
        return InMemory(shrunk, whole.labels[:count])

    return replace(data, train=part(data.train, images), test=part(data.test, len(data.test)), size=size)


def train_digits(
    make_model: Callable[[], nn.Module],
    change: Change,
    seed: int,
    *,
    steps: int,
    epochs: int,
    device: torch.device,
    data: DataSet | None = None,
    batch_size: int = 64,
) -> Trained:
    """Train for `steps` steps of a schedule of `epochs` epochs on augmented images, all from a seed."""
    data = data or digits.load()
    with seeded(seed, torch.device("cpu")):
        model = make_model()
    trainer = Trainer(change(model.to(device)), Recipe(epochs=epochs, seed=seed))
    batches = Batches(data, batch_size, Share(), seed, augment=True, device=device)
    counter = itertools.count(1)
    fit(
        trainer,
        lambda epoch, first: batches.training(data.train, epoch, first),
        lambda: (),
        should_stop=lambda: next(counter) == steps,
    )
    content = repr([tensor.tolist() for tensor in model.state_dict().values()])
    return Trained(
        evaluate(model, batches.evaluation(data.train)),
        evaluate(model, batches.evaluation(data.test)),
        hashlib.sha256(content.encode()).hexdigest()[:16],
    )


def roughly(model: nn.Module) -> nn.Module:
    """The same model with weights that differ by roundings: how far these alone carry training apart."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 2.0**-22)
    return model


def differs_beyond_noise(plain: Sequence[float], rough: Sequence[float], other: Sequence[float]) -> str | None:
    """Judge losses, a seed each, by what roundings alone do to training.

    Args:
        plain: of eager.
        rough: of eager, from weights that differ by roundings.
        other: of what is judged.

    Returns:
        None if `other` is within noise, else what it exceeds: a shift that is the same for all seeds (a paired t test
        at 1 %), differences larger than those of roundings (an F test at 1 %), or a mean shift larger than the
        deviation between seeds.
    """
    assert len(plain) == len(rough) == len(other) == 5
    own = [b - a for a, b in zip(plain, rough, strict=True)]
    paired = [b - a for a, b in zip(plain, other, strict=True)]
    shift, deviation = statistics.mean(paired), statistics.stdev(paired)
    if abs(shift) > T_99 * deviation / len(paired) ** 0.5:
        return f"shifted for all seeds alike by {shift:.3g} ± {deviation:.3g}"
    if _mean_square(paired) > F_99 * _mean_square(own):
        return f"differences {_mean_square(paired) ** 0.5:.3g}, of roundings alone {_mean_square(own) ** 0.5:.3g}"
    if abs(shift) > statistics.stdev(plain):
        return f"shift {shift:.3g}, and eager's deviation between seeds is {statistics.stdev(plain):.3g}"
    return None


def _mean_square(values: Sequence[float]) -> float:
    return statistics.mean(value * value for value in values)

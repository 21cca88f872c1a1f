"""What `limits` and `sweep` set beside one another: the naive model, memopt's levels, and whatever else is named."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

import memopt
from memopt.config import Recompute
from memopt.measure import GPU, PredictionError, StepFigures, measure_step
from memopt.measure.memory import leave
from memopt.measure.predict import Prediction, predict
from memopt.measure.steady import reserved_within
from memopt.measure.step import ModelFunction

from .errors import CommandError, describe, kind_of
from .job import Job
from .target import load_function


@dataclass(frozen=True, slots=True)
class Variant:
    """A way to run the model: its name, what is done to the model, what undoes it."""

    label: str
    apply: Callable[[nn.Module], nn.Module]
    remove: Callable[[nn.Module], nn.Module] = leave


NAIVE = Variant("naive", leave)


def memopt_variant(config: memopt.Config, label: str) -> Variant:
    """memopt as it would be on a GPU, where "auto" means fused kernels."""
    on_gpu = replace(config, numerics="fast") if config.numerics == "auto" else config
    return Variant(label, lambda model: memopt.apply(model, config=on_gpu), memopt.remove)


def levels(config: memopt.Config) -> tuple[Variant, ...]:
    """memopt at the level asked for, or at each."""
    if config.recompute != "auto":
        return (memopt_variant(config, f"memopt {config.recompute}"),)
    chosen: tuple[Recompute, ...] = ("concat", "layer")
    return tuple(memopt_variant(replace(config, recompute=level), f"memopt {level}") for level in chosen)


def other_variants(texts: Sequence[str]) -> tuple[Variant, ...]:
    """Variants written LABEL=path/file.py:function, the function taking and returning a model.

    Raises:
        CommandError: one does not parse, or names no function.
    """
    found: dict[str, Variant] = {}
    for text in texts:
        label, equals, place = text.partition("=")
        if not equals or not label:
            raise CommandError(f"--also {text!r} does not parse. Write LABEL=path/file.py:function.")
        if label.startswith("memopt"):
            raise CommandError(f"--also {text!r}: labels that begin with memopt are its own. Choose another label.")
        if label in found or label == NAIVE.label:
            raise CommandError(f"--also {text!r}: {label} is another variant's label already. Choose another label.")
        try:
            found[label] = Variant(label, _checked(load_function(place), label, place))
        except CommandError as error:
            raise CommandError(f"--also {label}: {error}") from error
    return tuple(found.values())


def _checked(function: Callable[[nn.Module], Any], label: str, place: str) -> ModelFunction:
    """A function of the user's, whose mistakes are said to be its own."""

    def apply(model: nn.Module) -> nn.Module:
        try:
            changed = function(model)
        except Exception as error:
            raise CommandError(f"--also {label}: {place} raised {describe(error)}.") from error
        if not isinstance(changed, nn.Module):
            raise CommandError(f"--also {label}: {place} returned {kind_of(changed)}. Let it return a model.")
        return changed

    return apply


def with_batch(job: Job, batch: int) -> Job:
    """The job with inputs of another batch size, without data."""
    return replace(job, inputs=tuple(x.new_empty((batch, *x.shape[1:]), device="meta") for x in job.inputs))


def predicted(job: Job, variant: Variant) -> tuple[StepFigures, int | None]:
    """Predicted figures of a variant.

    With them the largest peak allocated, if workspaces that were never measured take as much as they may; None where
    all were measured.

    Raises:
        CommandError: it cannot be predicted.
    """
    return _with_largest(_prediction(job, variant))


def predicted_within(job: Job, variant: Variant, memory_bytes: int) -> tuple[StepFigures, int | None]:
    """The same on a GPU with so much memory: more is reserved than that where the step does not fit.

    Raises:
        CommandError: it cannot be predicted.
    """
    prediction = _prediction(job, variant)
    figures, largest_bytes = _with_largest(prediction)
    reserved_bytes = reserved_within(prediction.trace, memory_bytes, GPU.expandable_segments)
    return replace(figures, peak_reserved_bytes=reserved_bytes), largest_bytes


def _with_largest(prediction: Prediction) -> tuple[StepFigures, int | None]:
    return prediction.figures, prediction.largest.peak_allocated_bytes if prediction.unmeasured else None


def kernels_of(config: memopt.Config) -> str:
    """Whose kernels `memopt_variant` predicts, in words."""
    kernels = "eager's kernels" if config.numerics == "exact" else "fused kernels, where a model has some"
    return f'numerics "{config.numerics}" ({kernels})'


def _prediction(job: Job, variant: Variant) -> Prediction:
    try:
        return predict(job.make_model, job.inputs, amp=job.amp, apply=variant.apply, remove=variant.remove)
    except PredictionError as error:
        if isinstance(error.__cause__, CommandError):
            raise error.__cause__ from None
        raise CommandError(f"{variant.label}: {error}") from error


def measured(job: Job, variant: Variant, device: torch.device, **options: Any) -> StepFigures:
    """Figures of a variant, measured on a device."""
    inputs = tuple(torch.randn(x.shape, dtype=x.dtype) for x in job.inputs)

    def make() -> nn.Module:
        return variant.apply(job.make_model().to(device))

    return measure_step(make, inputs, device, amp=job.amp, remove=variant.remove, **options)

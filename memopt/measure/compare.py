"""Before and after as data: equivalence, predicted GPU memory, and measured memory and time."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from memopt.ir import Explanation, MemoryPlan, mebibytes
from memopt.measure.bound import check_bound, without_tf32
from memopt.measure.equivalence import Equivalence, check_equivalence
from memopt.measure.memory import (
    StepFigures,
    available_bytes,
    clean,
    is_out_of_memory,
    leave,
    measure_step,
)
from memopt.measure.predict import Prediction, PredictionError, predict
from memopt.measure.step import Inputs, MakeModel, ModelFunction, autocast, on_device, seeded
from memopt.measure.target import GPU, Target
from memopt.measure.timeline import Timeline, thinned, timeline

# Samples that the check trains on where arithmetic is slow, or where the whole batch does not fit.
CHECK_SAMPLES = 2

# Less than this left between steps is not worth a sentence.
LEFT_BEHIND_BYTES = 2**20

# As fine as a picture of a step shows.
TIMELINE_MOMENTS = 800

Apply = Callable[[nn.Module, Inputs | None], nn.Module]
Explain = Callable[[nn.Module], Explanation]
OnStage = Callable[[str], object]
Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """A model before and after memopt.

    Attributes:
        device: type of the device that the model was checked and measured on, "cpu" or "cuda".
        device_name: the GPU's name; "the CPU" otherwise.
        input_shapes: shape of each input tensor.
        dtype: of the model's first parameter.
        amp: autocast dtype; None without.
        explanation: the chains found and what was done with each.
        equivalence: whether both train alike. When it failed, nothing was predicted or measured.
        checked_shapes: shapes of the inputs that the equivalence was checked on.
        target: the machine that the prediction speaks of.
        predicted_before: predicted for `target`, untouched model; None when it could not be.
        predicted_after: predicted for `target`, rewritten model; None when it could not be.
        before: measured on `device`, untouched model; None when not measured.
        after: measured on `device`, rewritten model; None when not measured.
        notes: anything else worth knowing, one sentence each.
        timeline_before: where the memory of the predicted step goes, untouched model; None without prediction.
        timeline_after: the same of the rewritten model.
        plan: what a memory budget made of it; None without one.
    """

    device: str
    device_name: str
    input_shapes: Shapes
    dtype: torch.dtype
    amp: torch.dtype | None
    explanation: Explanation
    equivalence: Equivalence
    checked_shapes: Shapes
    target: Target
    predicted_before: StepFigures | None = None
    predicted_after: StepFigures | None = None
    before: StepFigures | None = None
    after: StepFigures | None = None
    notes: tuple[str, ...] = ()
    timeline_before: Timeline | None = None
    timeline_after: Timeline | None = None
    plan: MemoryPlan | None = None

    def __str__(self) -> str:
        rewritten, found = len(self.explanation.rewritten), len(self.explanation.chains)
        return (
            f"Comparison on {self.device_name}: {rewritten} of {found} chains rewritten, "
            f"{'' if self.equivalence.passed else 'NOT '}equivalent. memopt.report.print_comparison prints it whole."
        )


def compare(
    make_model: MakeModel,
    inputs: Inputs,
    *,
    apply: Apply,
    remove: ModelFunction,
    explain: Explain,
    apply_on_target: ModelFunction | None = None,
    checking: Callable[[], AbstractContextManager[None]] = nullcontext,
    device: torch.device | None = None,
    amp: torch.dtype | None = None,
    measure: bool = True,
    check_steps: int = 3,
    warmup: int | None = None,
    steps: int | None = None,
    target: Target = GPU,
    on_stage: OnStage = lambda name: None,
) -> Comparison:
    """Check that memopt changes nothing, then predict (and measure) a training step without and with it.

    Args:
        make_model: builds a fresh model on the CPU; called several times.
        inputs: positional arguments of `forward`, on the CPU; the first dimension of the first tensor is the
            batch.
        apply: puts memopt on a model: at once when given example inputs, at the first training forward when
            given None. Returns the model.
        remove: takes memopt off again.
        explain: what memopt did with a model.
        apply_on_target: puts memopt on a model as it would be on `target`; None: as here.
        checking: entered while the two models are compared.
        device: where to check and to measure; None for the GPU if torch has one, else the CPU.
        amp: autocast dtype or None.
        measure: run and measure real training steps too; False predicts only.
        check_steps: optimiser steps that the equivalence is checked over.
        warmup: steps before the measured ones, see `measure_step`.
        steps: steps timed, see `measure_step`.
        target: the machine to predict for.
        on_stage: told what is done next, in a few words.

    Raises:
        StepError: nothing to train, or an output that no loss can be made from.
        Exception: whatever `apply` or the model's own forward raises.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    subject = _Subject(make_model, inputs, device, amp)
    before, after = _Variant("before", leave, leave), _Variant("after", lambda model: apply(model, None), remove)
    predicted = after if apply_on_target is None else replace(after, apply=apply_on_target)
    on_stage("checking that the numbers stay the same")
    with checking():
        result = _checked(subject, apply, explain, check_steps, target)
    if not result.equivalence.passed:
        return result
    for variant in (before, predicted):
        on_stage(f"predicting {target.name} memory {variant.when}")
        result = _with_prediction(result, subject, variant)
    for variant in (before, after) if measure else ():
        on_stage(f"measuring training steps {variant.when}")
        result = _with_measurement(result, subject, variant, warmup, steps)
    left = (
        *_left_behind("Predicted", result.predicted_before, result.predicted_after),
        *_left_behind("Measured", result.before, result.after),
    )
    return replace(result, notes=(*result.notes, *left))


@dataclass(frozen=True, slots=True)
class _Subject:
    """What is compared, and where."""

    make_model: MakeModel
    inputs: Inputs
    device: torch.device
    amp: torch.dtype | None


@dataclass(frozen=True, slots=True)
class _Variant:
    """The model before or after: what is put on it, and how that comes off."""

    when: str
    apply: ModelFunction
    remove: ModelFunction


def _checked(subject: _Subject, apply: Apply, explain: Explain, steps: int, target: Target) -> Comparison:
    few = first_samples(subject.inputs, CHECK_SAMPLES)
    if subject.device.type == "cpu":
        return _check(subject, few, apply, explain, steps, target)
    try:
        # On a GPU the whole batch, which may take other kernels than two samples do.
        return _check(subject, subject.inputs, apply, explain, steps, target)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    clean(subject.device)
    with without_tf32():
        return _check(subject, few, apply, explain, steps, target)


def _check(subject: _Subject, inputs: Inputs, apply: Apply, explain: Explain, steps: int, target: Target) -> Comparison:
    batch = on_device(inputs, subject.device)
    with seeded(0, subject.device):
        naive, rewritten = (subject.make_model().to(subject.device) for _ in range(2))
        # Recorded as it will run: autocast is part of what a forward does.
        with autocast(rewritten, subject.amp):
            apply(rewritten, batch)
    explanation = explain(rewritten)
    if any(chain.numerics == "fast" for chain in explanation.chains):
        equivalence = check_bound(naive, rewritten, batch, amp=subject.amp)
    else:
        equivalence = check_equivalence(naive, rewritten, [batch], steps=steps, amp=subject.amp)
    return Comparison(
        device=subject.device.type,
        device_name=_device_name(subject.device),
        input_shapes=shapes_of(subject.inputs),
        dtype=next(naive.parameters()).dtype,
        amp=subject.amp,
        explanation=explain(rewritten),
        equivalence=equivalence,
        checked_shapes=shapes_of(inputs),
        target=target,
    )


def _with_prediction(result: Comparison, subject: _Subject, variant: _Variant) -> Comparison:
    try:
        prediction = predict(
            subject.make_model,
            subject.inputs,
            result.target,
            amp=subject.amp,
            apply=variant.apply,
            remove=variant.remove,
        )
    except PredictionError as error:
        return replace(result, notes=(*result.notes, str(error)))
    result = replace(result, notes=(*result.notes, *_unmeasured(prediction, variant.when, result.target)))
    figures, line = prediction.figures, None
    if prediction.served is not None:
        line = timeline(prediction.trace, prediction.step_from, result.target.expandable_segments)
        line = thinned(line, TIMELINE_MOMENTS)
    if variant.when == "before":
        return replace(result, predicted_before=figures, timeline_before=line)
    return replace(result, predicted_after=figures, timeline_after=line)


def _unmeasured(prediction: Prediction, when: str, target: Target) -> tuple[str, ...]:
    """A sentence where workspaces were not measured that could raise the peak noticeably."""
    peak_bytes, largest_bytes = prediction.figures.peak_allocated_bytes, prediction.largest.peak_allocated_bytes
    assert peak_bytes is not None
    assert largest_bytes is not None
    if largest_bytes - peak_bytes <= LEFT_BEHIND_BYTES:
        return ()
    return (
        f"Predicted {when}: the workspaces of {len(prediction.unmeasured)} convolutions were never measured on a "
        f"{target.name} and are estimated. Upper bound of the peak allocated: {largest_bytes / 2**20:,.1f} MiB.",
    )


def _with_measurement(
    result: Comparison, subject: _Subject, variant: _Variant, warmup: int | None, steps: int | None
) -> Comparison:
    predicted = result.predicted_before if variant.when == "before" else result.predicted_after
    if subject.device.type == "cpu" and not _fits_in_memory(predicted):
        figures = StepFigures(out_of_memory=True)
    else:
        figures = measure_step(
            lambda: variant.apply(subject.make_model()),
            subject.inputs,
            subject.device,
            amp=subject.amp,
            remove=variant.remove,
            warmup=warmup,
            steps=steps,
        )
    if variant.when == "before":
        return replace(result, before=figures)
    return replace(result, after=figures)


def _left_behind(source: str, before: StepFigures | None, after: StepFigures | None) -> tuple[str, ...]:
    """A sentence where more stays allocated between steps with memopt, and is not among the retained bytes."""
    first, second = _baseline_bytes(before), _baseline_bytes(after)
    if first is None or second is None or second - first <= LEFT_BEHIND_BYTES:
        return ()
    return (
        f"{source}: beside what memopt keeps, {mebibytes(second - first)} more stay allocated between steps with it "
        "than without, workspaces of cuBLAS for example; memopt.remove does not free them. They are in the peak "
        "allocated, not in the activation peak.",
    )


def _baseline_bytes(figures: StepFigures | None) -> int | None:
    if figures is None or figures.peak_allocated_bytes is None or figures.activation_peak_bytes is None:
        return None
    return figures.peak_allocated_bytes - figures.activation_peak_bytes


def shapes_of(inputs: Inputs) -> Shapes:
    """Shape of each tensor among the inputs, in order."""
    return tuple(tuple(leaf.shape) for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor))


def first_samples(inputs: Inputs, count: int) -> Inputs:
    """The first `count` samples of the batch; tensors that are not made of samples stay whole."""
    shapes = shapes_of(inputs)
    batch = shapes[0][0] if shapes and shapes[0] else 0

    def first(tensor: torch.Tensor) -> torch.Tensor:
        # A tensor of another length (weights of classes, a mask) is not made of samples.
        return tensor[:count] if tensor.dim() > 0 and tensor.shape[0] == batch else tensor

    few: Inputs = tree_map_only(torch.Tensor, first, inputs)
    return few


def _fits_in_memory(predicted: StepFigures | None) -> bool:
    # Where the system grants more than it has, it kills the process instead of refusing the allocation.
    available = available_bytes()
    if predicted is None or predicted.peak_allocated_bytes is None or available is None:
        return True
    return predicted.peak_allocated_bytes <= available


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"

"""Memory of a training step on a GPU, found without one by a step on fake CPU tensors."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from memopt.garbage import quick_collections
from memopt.ir import watching_regions
from memopt.measure.cuda_libraries import CudaLibraries
from memopt.measure.memory import CUDA_WARMUP, StepFigures, leave, observe_step
from memopt.measure.steady import Served, repeated, served
from memopt.measure.step import Inputs, MakeModel, ModelFunction, TrainingStep, seeded
from memopt.measure.target import GPU, Target
from memopt.measure.trace import (
    BACKWARD_BEGINS,
    FORWARD_BEGINS,
    GRADIENTS,
    OPTIMIZER_STATE,
    PARAMETERS,
    STEP_ENDS,
    UPDATE_BEGINS,
    SimulatedDevice,
    Trace,
)
from memopt.measure.tracker import StorageTracker
from memopt.measure.workspaces import ConvolutionCall


class PredictionError(Exception):
    """The step could not be run on fake tensors."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """A predicted step, with what led to it.

    Attributes:
        figures: as `measure_step` would take them.
        trace: everything that was asked for from the model's making on; empty for a target whose allocator is not
            modelled.
        step_from: index of the event with which the predicted step begins.
        served: that step, as the target's allocator served it; None where that is not modelled.
        unmeasured: convolutions whose workspace was not measured; `figures` has estimates.
        largest: the figures if each of these took as much as it may: an upper bound.
    """

    figures: StepFigures
    trace: Trace
    step_from: int
    served: Served | None
    unmeasured: frozenset[ConvolutionCall]
    largest: StepFigures


def predict_step(
    make_model: MakeModel,
    inputs: Inputs,
    target: Target = GPU,
    *,
    amp: torch.dtype | None = None,
    apply: ModelFunction = leave,
    remove: ModelFunction = leave,
) -> StepFigures:
    """Predict the memory of one training step on `target`, computing nothing, on any machine.

    The operators are those that torch runs on a CPU, except where `target` is known to choose another that
    saves other bytes (dropout). CUDA's autocast is approximated by the CPU's of the same dtype, whose list of
    operators that stay in float32 differs in places (3-D pooling).

    Args:
        make_model: builds a fresh model on the CPU; its parameters and buffers are replaced by fake ones.
        inputs: positional arguments of `forward`; of tensors only shapes, strides, dtypes and `requires_grad`
            are read, so "meta" tensors do.
        target: the machine predicted for, as data.
        amp: autocast dtype or None.
        apply: called on the model once it is fake; memopt's apply for a prediction "after".
        remove: takes memopt off the model, to see what that frees.

    Returns:
        Figures in bytes; what is said of time is None, and so is `peak_reserved_bytes` for a target whose allocator is
        not modelled.

    Raises:
        PredictionError: the forward needs the values of a tensor, or an operator that has no fake
            implementation.
    """
    return predict(make_model, inputs, target, amp=amp, apply=apply, remove=remove).figures


def predict(
    make_model: MakeModel,
    inputs: Inputs,
    target: Target = GPU,
    *,
    amp: torch.dtype | None = None,
    apply: ModelFunction = leave,
    remove: ModelFunction = leave,
) -> Prediction:
    """What `predict_step` predicts, with the requests that it is made of. Arguments and errors are the same."""
    # Tensors that are neither parameter, buffer nor input (constants in the user's file) become fake when
    # met.
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    device = SimulatedDevice(target.expandable_segments) if target.device_type == "cuda" else None
    libraries = None if device is None else CudaLibraries(device, target)
    tracker = StorageTracker(target.rounding_bytes, mode, device, libraries)
    with quick_collections(), seeded(0, torch.device("cpu")), ExitStack() as stack:
        model = make_fake(make_model(), mode)
        tracker.track(model)
        if device is not None:
            device.tag_all(PARAMETERS)
            stack.enter_context(watching_regions(device.region_has_run))
        for context in (mode, _operators_of(target), tracker):
            stack.enter_context(context)
        try:
            step = _TaggedStep(tracker, device, apply(model), _fake_like(inputs), amp)
            step.run()  # the optimiser's state appears in the first step, and so do memopt's plans
            step_from = 0 if device is None else len(device.trace.events)
            figures = observe_step(step, tracker if device is None else device, remove)
        except Exception as error:
            raise PredictionError(
                f"The {target.name} memory of {type(model).__name__} cannot be predicted: {_why_not(error)}."
            ) from error
    if device is None or libraries is None:
        return Prediction(figures, Trace(), 0, None, frozenset(), figures)
    trace, step_from = repeated(device.trace, step_from, CUDA_WARMUP - 1)
    last = served(trace, step_from, target.expandable_segments)
    figures = _as_figures(last, figures.retained_bytes)
    largest = figures
    if libraries.unmeasured:
        bound = _as_figures(served(trace, step_from, target.expandable_segments, bounds=True), figures.retained_bytes)
        largest = _largest(figures, bound)
    return Prediction(figures, trace, step_from, last, frozenset(libraries.unmeasured), largest)


def _as_figures(last: Served, retained_bytes: int | None) -> StepFigures:
    return StepFigures(
        activation_peak_bytes=last.peak_allocated_bytes - last.before_bytes + (retained_bytes or 0),
        peak_allocated_bytes=last.peak_allocated_bytes,
        peak_reserved_bytes=last.peak_reserved_bytes,
        saved_bytes=last.saved_bytes,
        retained_bytes=retained_bytes,
    )


def _largest(figures: StepFigures, bound: StepFigures) -> StepFigures:
    """The larger of each: served otherwise, a request may also end up in a better place."""
    names = ("activation_peak_bytes", "peak_allocated_bytes", "peak_reserved_bytes", "saved_bytes")
    return replace(figures, **{name: max(getattr(figures, name), getattr(bound, name)) for name in names})


class _TaggedStep(TrainingStep):
    """Says at what moments a step turns, and which requests are gradients and the optimiser's state."""

    def __init__(
        self,
        tracker: StorageTracker,
        device: SimulatedDevice | None,
        model: nn.Module,
        inputs: Inputs,
        amp: torch.dtype | None,
    ) -> None:
        super().__init__(model, inputs, amp)
        self._tracker, self._device = tracker, device

    def forward(self) -> torch.Tensor:
        self._mark(FORWARD_BEGINS)
        loss = super().forward()
        self._mark(BACKWARD_BEGINS)
        return loss

    def update(self) -> None:
        self._mark(UPDATE_BEGINS)
        self._tag((p.grad for p in self.model.parameters()), GRADIENTS)
        super().update()
        self._tag((leaf for state in self.optimizer.state.values() for leaf in state.values()), OPTIMIZER_STATE)

    def clear(self) -> None:
        super().clear()
        self._mark(STEP_ENDS)

    def _mark(self, name: str) -> None:
        if self._device is not None:
            self._device.mark(name)

    def _tag(self, things: Iterable[Any], tag: str) -> None:
        for thing in things:
            number = self._tracker.request_of(thing) if isinstance(thing, torch.Tensor) else None
            if number is not None and self._device is not None:
                self._device.trace.tags[number] = tag


def make_fake(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """The same module object with its parameters and buffers made fake; what was shared stays shared."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = mode.from_tensor(tensor, static_shapes=True)  # type: ignore[assignment]
    return model


def _fake_like(inputs: Inputs) -> Inputs:
    def fake(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(
            tensor.shape,
            tensor.stride(),
            dtype=tensor.dtype,
            requires_grad=tensor.requires_grad,
            device="cpu",
        )

    made: Inputs = tree_map_only(torch.Tensor, fake, inputs)
    return made


class _CudaOperators(TorchFunctionMode):
    """Takes the operator that torch takes on CUDA where it saves other bytes than the CPU's."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        replacement = _CUDA_CHOICES.get(func)
        # Only on the fake tensors themselves: a tracer's proxies must record what the user wrote.
        if replacement is not None and args and isinstance(args[0], FakeTensor):
            return replacement(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _cuda_dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """Saves one byte an element (a bool mask) where the CPU's saves the scaled noise in the input's dtype."""
    if inplace or not training or not 0.0 < p < 1.0:
        return F.dropout(input, p, training, inplace)
    return torch.native_dropout(input, p, training)[0]


_CUDA_CHOICES: dict[Any, Callable[..., torch.Tensor]] = {F.dropout: _cuda_dropout}


def _operators_of(target: Target) -> ExitStack | TorchFunctionMode:
    return _CudaOperators() if target.device_type == "cuda" else ExitStack()


def _why_not(error: BaseException) -> str:
    if isinstance(error, DataDependentOutputException):
        return (
            "predictions run on tensors without data, and forward needs the value of a tensor, as .item() or a branch "
            "on it do. memopt.explain says where; measure it there instead"
        )
    lines = str(error).strip().splitlines()
    what = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return f"a step on tensors without data raised {what}. If one with data does not, measure it there instead"

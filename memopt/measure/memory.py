"""Memory and time of a real training step, each model from a clean state."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from memopt.measure.step import Inputs, MakeModel, ModelFunction, TrainingStep, on_device, seeded
from memopt.measure.tracker import StorageTracker

CUDA_WARMUP, CUDA_STEPS = 3, 10
# On a CPU a step takes seconds where a GPU takes milliseconds.
CPU_WARMUP, CPU_STEPS, MOST_CPU_STEPS = 1, 2, 20

# How libraries below torch say that memory ran out, where they do not raise torch.OutOfMemoryError.
_OUT_OF_MEMORY_TEXTS = ("not enough memory", "can't allocate memory", "_STATUS_ALLOC_FAILED")

MakeStep = Callable[[], TrainingStep]


@dataclass(frozen=True, slots=True)
class StepFigures:
    """What one training step costs. A figure that was not taken is None.

    Attributes:
        activation_peak_bytes: peak allocated from forward to optimiser step, minus what was allocated before
            the step with gradients None, plus `retained_bytes`: what is kept between steps for activations'
            sake counts.
        peak_allocated_bytes: highest sum of live allocations during the step, parameters and optimiser
            included.
        peak_reserved_bytes: most that the caching allocator took from the device; None on a CPU.
        saved_bytes: allocated after forward and loss, minus before the step: what backward waits for.
        retained_bytes: what removing memopt from the model frees between steps, gradients None.
        step_seconds: median time of a step; None when predicted.
        timed_steps: of how many steps `step_seconds` is the median; None when predicted.
        out_of_memory: the step did not fit; every figure is None.
    """

    activation_peak_bytes: int | None = None
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    saved_bytes: int | None = None
    retained_bytes: int | None = None
    step_seconds: float | None = None
    timed_steps: int | None = None
    out_of_memory: bool = False


class Ledger(Protocol):
    """Something that knows how many bytes are allocated."""

    @property
    def current_bytes(self) -> int:
        """Allocated now."""

    @property
    def peak_bytes(self) -> int:
        """Most allocated since `reset_peak`."""

    def reset_peak(self) -> None:
        """Start a new peak from what is allocated now."""


class CudaLedger:
    """The caching allocator's figures for one device, less what was on it when the ledger was made."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start_bytes = torch.cuda.memory_allocated(device)
        self._start_reserved_bytes = torch.cuda.memory_reserved(device)

    @property
    def current_bytes(self) -> int:
        """Allocated now."""
        return torch.cuda.memory_allocated(self._device) - self._start_bytes

    @property
    def peak_bytes(self) -> int:
        """Most allocated since `reset_peak`."""
        return torch.cuda.max_memory_allocated(self._device) - self._start_bytes

    @property
    def peak_reserved_bytes(self) -> int:
        """Most taken from the device, warm-up included: blocks freed there stay reserved."""
        return torch.cuda.max_memory_reserved(self._device) - self._start_reserved_bytes

    def reset_peak(self) -> None:
        """Start a new peak from what is allocated now."""
        torch.cuda.reset_peak_memory_stats(self._device)


def leave(model: nn.Module) -> nn.Module:
    """`remove` for a model that nothing was applied to."""
    return model


def measure_step(
    make_model: MakeModel,
    inputs: Inputs,
    device: torch.device,
    *,
    amp: torch.dtype | None = None,
    remove: ModelFunction = leave,
    warmup: int | None = None,
    steps: int | None = None,
    seed: int = 0,
) -> StepFigures:
    """Run training steps and take their memory and time; nothing is left behind on the device.

    Args:
        make_model: builds a fresh model, on any device; called twice, once for the memory and once for the
            time.
        inputs: positional arguments of `forward`; tensors are copied to `device`. Keep them on the CPU, else
            what the caller holds on the device is missing from the peak allocated.
        device: where to run. On "cuda" the figures are the caching allocator's, on "cpu" those of a
            `StorageTracker`.
        amp: autocast dtype or None.
        remove: takes memopt off the model, to see what that frees.
        warmup: steps before the measured ones (default 3 on CUDA, 1 on a CPU).
        steps: steps timed, of which the median is given (default 10 on CUDA; on a CPU 2, or as many as a second
            has time for, up to 20).
        seed: of the random numbers, initial weights included.

    Returns:
        The figures; with `out_of_memory` set and no figures when the device was too small.
    """
    on_cuda = device.type == "cuda"
    warmup = (CUDA_WARMUP if on_cuda else CPU_WARMUP) if warmup is None else warmup

    def make_step() -> TrainingStep:
        step = TrainingStep(make_model().to(device), on_device(inputs, device), amp)
        for _ in range(warmup):
            step.run()
        return step

    figures = StepFigures(out_of_memory=True)
    clean(device)
    try:
        with seeded(seed, device):
            measured = _memory(make_step, device, remove)
            clean(device)
            seconds = _seconds(make_step(), device, steps)
            figures = replace(measured, step_seconds=statistics.median(seconds), timed_steps=len(seconds))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    # Outside the handler: the traceback, whose frames hold the model and its graph, is gone by now.
    clean(device)
    return figures


def observe_step(step: TrainingStep, ledger: Ledger, remove: ModelFunction = leave) -> StepFigures:
    """Run one step, then take memopt off, reading the ledger in between.

    Args:
        step: warmed up, so that the optimiser's state exists, with gradients None.
        ledger: counts at least everything that the step touches.
        remove: takes memopt off the model.
    """
    gc.collect()
    before_bytes = ledger.current_bytes
    ledger.reset_peak()
    loss = step.forward()
    saved_bytes = ledger.current_bytes - before_bytes
    loss.backward()  # type: ignore[no-untyped-call]
    del loss
    step.update()
    peak_bytes = ledger.peak_bytes
    step.clear()
    gc.collect()
    kept_bytes = ledger.current_bytes
    remove(step.model)
    gc.collect()
    retained_bytes = kept_bytes - ledger.current_bytes
    return StepFigures(
        activation_peak_bytes=peak_bytes - before_bytes + retained_bytes,
        peak_allocated_bytes=peak_bytes,
        saved_bytes=saved_bytes,
        retained_bytes=retained_bytes,
    )


def clean(device: torch.device) -> None:
    """Collect garbage and give the device's cached memory back."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        # cuBLAS keeps a workspace from its first call on; left there, only the first model measured would pay
        # for it.
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device's or the machine's memory ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(text in str(error) for text in _OUT_OF_MEMORY_TEXTS)


def available_bytes() -> int | None:
    """Memory that this machine can still give, swap not counted; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else None


def _memory(make_step: MakeStep, device: torch.device, remove: ModelFunction) -> StepFigures:
    if device.type == "cuda":
        ledger = CudaLedger(device)
        figures = observe_step(make_step(), ledger, remove)
        return replace(figures, peak_reserved_bytes=ledger.peak_reserved_bytes)
    # The tracker watches from the model's making on, so that it knows what warm-up left behind.
    with StorageTracker() as tracker:
        step = make_step()
        tracker.track(step.model, step.inputs, step.optimizer)
        return observe_step(step, tracker, remove)


def _seconds(step: TrainingStep, device: torch.device, steps: int | None) -> list[float]:
    """Of each step."""
    if device.type == "cuda":
        return [_cuda_seconds(step, device) for _ in range(CUDA_STEPS if steps is None else steps)]
    least, most = (CPU_STEPS, MOST_CPU_STEPS) if steps is None else (steps, steps)
    seconds: list[float] = []
    while len(seconds) < least or (len(seconds) < most and sum(seconds) < 1.0):
        seconds.append(_cpu_seconds(step, device))
    return seconds


def _cpu_seconds(step: TrainingStep, device: torch.device) -> float:
    start = time.perf_counter()
    step.run()
    return time.perf_counter() - start


def _cuda_seconds(step: TrainingStep, device: torch.device) -> float:
    stream = torch.cuda.current_stream(device)
    start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    start.record(stream)
    step.run()
    end.record(stream)
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000.0

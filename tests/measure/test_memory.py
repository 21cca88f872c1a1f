import gc
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import memopt
from densenet_models.bc import DenseNet
from memopt.measure import GPU, StepFigures, memory, predict_step
from memopt.measure.memory import clean, is_out_of_memory, leave, measure_step

CPU = torch.device("cpu")


def bytes_of(*tensors: torch.Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def test_figures_of_a_step_that_can_be_counted_by_hand() -> None:
    x = torch.ones(8, 1000)
    figures = measure_step(lambda: nn.Linear(1000, 500, bias=False), (x,), CPU, warmup=1, steps=1)
    weight_bytes, output_bytes = 4 * 1000 * 500, 4 * 8 * 500
    # Weight, momentum, input, and the weight's gradient at the end of backward.
    assert figures.peak_allocated_bytes == pytest.approx(3 * weight_bytes + x.nbytes, rel=0.02)
    assert figures.activation_peak_bytes == pytest.approx(weight_bytes, rel=0.02)
    # Cross-entropy keeps the log-softmax and the classes; the logits themselves are freed.
    assert figures.saved_bytes == pytest.approx(output_bytes, rel=0.02)
    assert figures.retained_bytes == 0
    assert figures.peak_reserved_bytes is None
    assert figures.step_seconds is not None
    assert figures.step_seconds > 0
    assert figures.timed_steps == 1


def test_a_buffer_kept_between_steps_raises_the_activation_peak(make_tiny, images, keeper) -> None:
    plain = measure_step(make_tiny, images, CPU, steps=1)
    kept = measure_step(lambda: keeper.apply(make_tiny()), images, CPU, remove=keeper.remove, steps=1)
    assert plain.retained_bytes == 0
    assert kept.retained_bytes == keeper.kept_bytes
    assert kept.activation_peak_bytes == plain.activation_peak_bytes + keeper.kept_bytes
    assert kept.saved_bytes == plain.saved_bytes


def test_warm_up_makes_the_optimisers_state_part_of_what_was_there(make_tiny, images) -> None:
    cold = measure_step(make_tiny, images, CPU, warmup=0, steps=1)
    warm = measure_step(make_tiny, images, CPU, warmup=1, steps=1)
    momentum_bytes = bytes_of(*make_tiny().parameters())
    assert warm.peak_allocated_bytes == cold.peak_allocated_bytes + momentum_bytes
    assert warm.activation_peak_bytes == cold.activation_peak_bytes


def test_runs_the_steps_asked_for_and_leaves_nothing_behind(make_tiny, images) -> None:
    models: list[weakref.ref[nn.Module]] = []
    calls = []

    def make() -> nn.Module:
        model = make_tiny()
        model.register_forward_pre_hook(lambda *_: calls.append(1))
        models.append(weakref.ref(model))
        return model

    measure_step(make, images, CPU, warmup=2, steps=3)
    # One model for the memory (2 warm-up, 1 counted), one for the time (2 warm-up, 3 timed).
    assert len(calls) == 3 + 5
    assert all(model() is None for model in models)


def test_more_steps_are_timed_where_they_are_quick(monkeypatch: pytest.MonkeyPatch, make_tiny, images) -> None:
    def timed_in(seconds: float) -> int | None:
        monkeypatch.setattr(memory, "_cpu_seconds", lambda step, device: seconds)
        return measure_step(make_tiny, images, CPU).timed_steps

    assert [timed_in(seconds) for seconds in (0.01, 0.15, 0.6, 5.0)] == [20, 7, 2, 2]


def test_same_bytes_every_time_and_random_numbers_untouched(make_tiny, images) -> None:
    state = torch.get_rng_state()
    first, second = (measure_step(make_tiny, images, CPU, steps=1) for _ in range(2))
    assert first.activation_peak_bytes == second.activation_peak_bytes
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
    ],
)
def test_out_of_memory_is_a_row_and_frees_everything(error: Exception, images) -> None:
    class Greedy(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.kept = torch.empty(10)
            # Another object each time: its traceback holds this frame, and so the model.
            raise type(error)(*error.args)

    models: list[weakref.ref[nn.Module]] = []

    def make() -> nn.Module:
        model = Greedy(2, 2)
        models.append(weakref.ref(model))
        return model

    gc.collect()
    assert measure_step(make, images, CPU) == StepFigures(out_of_memory=True)
    assert models[0]() is None


def test_really_running_out_of_memory_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_other_errors_are_raised(images) -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        measure_step(lambda: nn.Linear(5, 5), images, CPU)


def test_available_memory_is_what_the_system_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    2048 kB\n", encoding="ascii")
    monkeypatch.setattr(memory, "Path", lambda _: tmp_path / "meminfo")
    assert memory.available_bytes() == 2048 * 1024
    monkeypatch.setattr(memory, "Path", lambda _: tmp_path / "absent")
    assert memory.available_bytes() is None


@pytest.mark.gpu
def test_gpu_figures_come_from_the_allocator_and_nothing_stays(make_tiny, keeper) -> None:
    device, x = torch.device("cuda", torch.cuda.current_device()), torch.randn(64, 3, 32, 32)
    clean(device)
    before_bytes = torch.cuda.memory_allocated(device)
    plain = measure_step(make_tiny, (x,), device, steps=3)
    kept = measure_step(lambda: keeper.apply(make_tiny()), (x,), device, remove=keeper.remove, steps=3)
    keeper.kept.clear()  # the test's own: what the model timed last had it keep
    assert torch.cuda.memory_allocated(device) == before_bytes
    assert kept.retained_bytes == keeper.kept_bytes
    risen_bytes = kept.activation_peak_bytes - plain.activation_peak_bytes
    assert risen_bytes == pytest.approx(keeper.kept_bytes, rel=0.05)
    assert plain.peak_reserved_bytes >= plain.peak_allocated_bytes


@pytest.mark.gpu
@pytest.mark.parametrize("applied", [False, True])
def test_gpu_prediction_is_within_five_percent(applied: bool) -> None:
    device, x = torch.device("cuda", torch.cuda.current_device()), torch.randn(64, 3, 32, 32)
    exactly = memopt.Config(numerics="exact")
    apply, remove = (partial(memopt.apply, config=exactly), memopt.remove) if applied else (leave, leave)
    measured = measure_step(lambda: apply(DenseNet()), (x,), device, remove=remove, steps=1)
    predicted = predict_step(DenseNet, (x,), GPU, apply=apply, remove=remove)
    assert predicted.activation_peak_bytes == pytest.approx(measured.activation_peak_bytes, rel=0.05)


@pytest.mark.gpu
def test_gpu_out_of_memory_is_a_row_and_the_next_step_runs(make_tiny) -> None:
    class Greedy(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(torch.empty(1 << 50, device=x.device))

    device = torch.device("cuda", torch.cuda.current_device())
    assert measure_step(lambda: Greedy(2, 2), (torch.randn(2, 2),), device).out_of_memory
    assert not measure_step(make_tiny, (torch.randn(2, 3, 8, 8),), device, steps=1).out_of_memory

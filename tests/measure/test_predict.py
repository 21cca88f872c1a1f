import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import memopt
from densenet_models.bc import DenseNet, densenet264
from memopt.measure import GPU, PredictionError, measure_step, predict_step
from memopt.measure.predict import make_fake, predict
from memopt.measure.trace import BACKWARD_BEGINS, FORWARD_BEGINS
from tests.bench.scripts import load

MIB = 2**20
CPU = torch.device("cpu")
EXACT = replace(GPU, device_type="cpu", rounding_bytes=1)


def test_without_rounding_it_is_what_a_cpu_measures(make_tiny, images) -> None:
    predicted = predict_step(make_tiny, images, EXACT)
    measured = measure_step(make_tiny, images, CPU, steps=1)
    assert predicted == replace(measured, step_seconds=None, timed_steps=None)


def test_with_autocast_too(make_tiny, images) -> None:
    predicted = predict_step(make_tiny, images, EXACT, amp=torch.bfloat16)
    measured = measure_step(make_tiny, images, CPU, amp=torch.bfloat16, steps=1)
    # oneDNN's bfloat16 kernels may return padded tensors.
    assert predicted.activation_peak_bytes == pytest.approx(measured.activation_peak_bytes, rel=0.01)
    assert predicted.activation_peak_bytes < predict_step(make_tiny, images, EXACT).activation_peak_bytes


def test_naive_densenet_bc_100_has_its_known_figures() -> None:
    figures = predict_step(DenseNet, (torch.empty(64, 3, 32, 32, device="meta"),))
    # Measured on an H200 (tests/bench/results/train_step.csv): 2151.8, 2234.3, 2162.4 and 2446 MiB.
    assert figures.saved_bytes / MIB == pytest.approx(2151.8, rel=0.005)
    assert figures.peak_allocated_bytes / MIB == pytest.approx(2234.3, rel=0.005)
    assert figures.activation_peak_bytes / MIB == pytest.approx(2162.4, rel=0.005)
    assert figures.peak_reserved_bytes / MIB == pytest.approx(2446, rel=0.01)
    assert (figures.step_seconds, figures.out_of_memory) == (None, False)


def seconds_of_fake_operations(sizes: range) -> float:
    """Torch's own work for tensors without data of so many sizes, most of what a prediction does: the host's pace."""
    start = time.process_time()
    with FakeTensorMode():
        for size in sizes:
            (torch.empty(2, size)[:, 1:] + 1).relu_()
    return time.process_time() - start


def test_densenet264_at_batch_256_is_predicted_within_twenty_seconds() -> None:
    """At a pace of a second for those operations: shared hosts are at times half as quick."""
    seconds_of_fake_operations(range(10, 20))  # what torch imports first
    pace = seconds_of_fake_operations(range(1000, 1600))
    start = time.process_time()  # which does not count what others do meanwhile
    figures = predict_step(densenet264, (torch.empty(256, 3, 224, 224, device="meta"),))
    assert time.process_time() - start < 20 * max(1.0, pace)
    assert figures.activation_peak_bytes > 60 * 2**30


def test_memopt_applied_to_the_fake_model_saves(images) -> None:
    def make() -> nn.Module:
        return DenseNet(depth=22)

    x = (torch.empty(16, 3, 32, 32),)
    before = predict_step(make, x)
    after = predict_step(make, x, apply=memopt.apply, remove=memopt.remove)
    assert after.activation_peak_bytes < 0.6 * before.activation_peak_bytes
    assert after.retained_bytes == 0
    between_steps = [f.peak_allocated_bytes - f.activation_peak_bytes for f in (before, after)]
    assert between_steps[1] == pytest.approx(between_steps[0], rel=0.01)


def test_a_buffer_kept_between_steps_raises_the_activation_peak(make_tiny, images, keeper) -> None:
    plain = predict_step(make_tiny, images)
    kept = predict_step(make_tiny, images, apply=keeper.apply, remove=keeper.remove)
    assert kept.retained_bytes == keeper.kept_bytes
    assert kept.activation_peak_bytes == plain.activation_peak_bytes + keeper.kept_bytes


def test_both_workspaces_of_blas_are_allocated_before_the_step(make_tiny, images) -> None:
    plain, working = (predict_step(make_tiny, images, replace(GPU, blas_workspace_bytes=n)) for n in (0, 4 * MIB))
    assert working.peak_allocated_bytes == plain.peak_allocated_bytes + 8 * MIB
    assert working.peak_reserved_bytes == plain.peak_reserved_bytes + 20 * MIB  # both in one segment
    assert working.activation_peak_bytes == plain.activation_peak_bytes


@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer_with_a_bias_has_cublaslt_keep_a_workspace(bias: bool, images) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(images[0][0].numel(), 3, bias=bias))

    plain, working = (predict_step(make, images, replace(GPU, blas_lt_workspace_bytes=n)) for n in (0, 4 * MIB))
    assert working.peak_allocated_bytes == plain.peak_allocated_bytes + 4 * MIB * bias
    assert working.activation_peak_bytes == plain.activation_peak_bytes


newest = load("rows_table").newest


def measured_reserved_bytes(variant: str) -> int:
    """Of DenseNet-BC-100 at batch 64, on the GPU that the committed row names."""
    (row,) = (r for r in newest("train_step.csv", "bc100-64", variant) if r["variant"] == variant)
    return int(row["peak_reserved_bytes"])


@pytest.mark.parametrize("variant", ["fast layer", "fast layer, expandable segments", "exact layer"])
def test_densenet_bc_100_with_memopt_reserves_what_was_measured(variant: str) -> None:
    numerics, recompute = variant.partition(",")[0].split()
    config, expandable = memopt.Config(numerics=numerics, recompute=recompute), "expandable" in variant
    figures = predict_step(
        DenseNet,
        (torch.empty(64, 3, 32, 32, device="meta"),),
        replace(GPU, expandable_segments=expandable),
        apply=lambda model: memopt.apply(model, config=config),
    )
    assert figures.peak_reserved_bytes == pytest.approx(measured_reserved_bytes(f"memopt {variant}"), rel=0.06)


def test_recording_forward_is_no_memory_of_the_step() -> None:
    x = (torch.empty(16, 3, 32, 32, device="meta"),)
    origins = predict(lambda: DenseNet(depth=16), x, apply=memopt.apply).trace.origins
    files = {Path(origin.code.co_filename).parent.name for origin in origins if origin.code is not None}
    assert "ops" in files  # of the runtime
    assert "capture" not in files


def test_recording_forward_casts_nothing_for_the_step() -> None:
    # Autocast keeps casts of parameters, and would hand the step those that the recording made unseen.
    x = (torch.empty(4, 3, 16, 16, device="meta"),)
    trace = predict(lambda: DenseNet(depth=10), x, amp=torch.bfloat16, apply=memopt.apply).trace
    begins, ends = ([at for name, at in trace.marks if name == moment] for moment in (FORWARD_BEGINS, BACKWARD_BEGINS))
    first, last = (
        Counter(str(trace.origins[event.number]) for event in trace.events[begin:end] if event.size_bytes)
        for begin, end in zip(begins, ends, strict=True)
    )
    casts = Counter({origin: count for origin, count in last.items() if "_to_copy" in origin})
    assert casts.total() > 10
    assert casts <= first


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_gradient_that_lies_otherwise_is_copied_by_cuda(layout: torch.memory_format) -> None:
    class Pooling(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weights = torch.empty(16, 64, 32, 32).to(memory_format=layout)
            return (F.avg_pool2d(super().forward(x), 2) * weights).sum()

    trace = predict(lambda: Pooling(3, 64, 3, padding=1), (torch.empty(16, 3, 64, 64),)).trace
    copies = [o for o in trace.origins if str(o) == "gradient copied by aten.avg_pool2d_backward.default"]
    assert len(copies) == (4 if layout is torch.channels_last else 0)  # one a step


def test_dropout_saves_a_mask_of_bools_on_a_gpu() -> None:
    class Dropping(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.dropout(super().forward(x), 0.5, self.training).sum()

    x = (torch.empty(1024, 1024),)
    on_gpu = predict_step(lambda: Dropping(1024, 1024), x)
    on_cpu = predict_step(lambda: Dropping(1024, 1024), x, replace(GPU, device_type="cpu"))
    # Float noise on a CPU, of the size of the output; a quarter of it on a GPU.
    assert on_cpu.saved_bytes == pytest.approx(4 * MIB, rel=0.01)
    assert on_gpu.saved_bytes == pytest.approx(1 * MIB, rel=0.01)
    evaluated = predict_step(lambda: Dropping(1024, 1024).eval(), x)
    assert evaluated.saved_bytes < MIB // 2


def test_shared_parameters_stay_shared_and_flags_survive() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[1].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    assert make_fake(model, FakeTensorMode()) is model
    assert model[1].weight is model[0].weight
    assert isinstance(model[0].weight, FakeTensor)
    assert isinstance(model[0].weight, nn.Parameter)
    assert isinstance(model[2].running_mean, FakeTensor)
    assert (model[0].weight.requires_grad, model[0].bias.requires_grad) == (True, False)


def test_constants_outside_the_model_are_no_obstacle(images) -> None:
    mean = torch.ones(1, 3, 1, 1)

    class Normalising(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x - mean)

    assert predict_step(lambda: Normalising(3, 4, 3), images).saved_bytes


def test_a_forward_that_reads_values_cannot_be_predicted(images) -> None:
    class Reading(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x * x.max().item())

    with pytest.raises(PredictionError, match=r"GPU memory of Reading cannot be predicted.* value of a tensor"):
        predict_step(lambda: Reading(3, 4, 3), images)


def test_random_numbers_are_left_alone(make_tiny, images) -> None:
    state = torch.get_rng_state()
    predict_step(lambda: make_tiny(drop_rate=0.5), images)
    assert torch.equal(torch.get_rng_state(), state)

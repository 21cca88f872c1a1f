from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import memopt
from densenet_models.bc import DenseNet
from memopt.measure import GPU, PredictionError, measure_step, predict_step
from memopt.measure.predict import make_fake

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
    assert figures.saved_bytes / MIB == pytest.approx(2125, abs=1)
    assert figures.peak_allocated_bytes / MIB == pytest.approx(2142, abs=1)
    assert figures.activation_peak_bytes / MIB == pytest.approx(2136, abs=1)
    assert (figures.peak_reserved_bytes, figures.step_seconds, figures.out_of_memory) == (None, None, False)


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


def test_workspaces_of_the_target_count_as_allocated(make_tiny, images) -> None:
    plain, working = (predict_step(make_tiny, images, replace(GPU, workspace_bytes=n)) for n in (0, 1000))
    assert working.peak_allocated_bytes == plain.peak_allocated_bytes + 1000
    assert working.activation_peak_bytes == plain.activation_peak_bytes


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

    with pytest.raises(PredictionError, match=r"Reading cannot run on tensors without data .* GPU memory"):
        predict_step(lambda: Reading(3, 4, 3), images)


def test_random_numbers_are_left_alone(make_tiny, images) -> None:
    state = torch.get_rng_state()
    predict_step(lambda: make_tiny(drop_rate=0.5), images)
    assert torch.equal(torch.get_rng_state(), state)

from pathlib import Path

import pytest
import torch

import memopt
from densenet_models.bc import DenseNet
from memopt.measure import GPU
from memopt.measure.predict import Prediction, predict
from memopt.measure.timeline import CATEGORIES, Timeline, categorised, thinned, timeline
from memopt.measure.trace import BACKWARD_BEGINS, FORWARD_BEGINS, STEP_ENDS, Origin, SimulatedDevice

RUNTIME = [path.stem for path in (Path(memopt.__file__).parent / "runtime").rglob("*.py")]
X = (torch.empty(16, 3, 32, 32, device="meta"),)


@pytest.fixture(scope="module")
def predictions() -> dict[str, Prediction]:
    config = memopt.Config(numerics="fast")
    return {
        "naive": predict(lambda: DenseNet(depth=16), X),
        "memopt": predict(lambda: DenseNet(depth=16), X, apply=lambda model: memopt.apply(model, config=config)),
    }


def line_of(prediction: Prediction) -> Timeline:
    return timeline(prediction.trace, prediction.step_from)


@pytest.mark.parametrize("name", ["naive", "memopt"])
def test_categories_add_up_to_the_predicted_peak(predictions: dict[str, Prediction], name: str) -> None:
    prediction, line = predictions[name], line_of(predictions[name])
    assert line.peak_bytes == prediction.figures.peak_allocated_bytes
    assert max(map(sum, line.moments)) == line.peak_bytes
    assert sum(holding.size_bytes for holding in line.holdings) == line.peak_bytes
    assert min(min(moment) for moment in line.moments) >= 0


def test_parameters_gradients_and_optimizer_state_are_told_apart(predictions: dict[str, Prediction]) -> None:
    line = line_of(predictions["naive"])
    model = DenseNet(depth=16)
    exact = sum(p.nbytes for p in model.parameters())
    count = len(list(model.parameters()))
    update = dict(line.phases)["update"]
    at_update = dict(zip(CATEGORIES, line.moments[update - 1], strict=True))
    # Rounded up to 512 bytes each.
    assert exact <= at_update["gradients"] <= exact + 512 * count
    assert exact <= at_update["optimizer state"] <= exact + 512 * count
    buffers = sum(b.nbytes for b in model.buffers())
    assert exact + buffers <= at_update["parameters"] <= exact + buffers + 512 * (count + len(list(model.buffers())))
    assert at_update["workspaces"] == GPU.blas_workspace_bytes * 2 + GPU.blas_lt_workspace_bytes
    # Between steps, gradients None: nothing but these and the batch.
    assert dict(zip(CATEGORIES, line.moments[-1], strict=True))["gradients"] == 0


def test_naive_memory_is_activations_and_memopts_is_arenas(predictions: dict[str, Prediction]) -> None:
    naive, ours = (line_of(predictions[name]).at_peak for name in ("naive", "memopt"))
    assert naive["arenas"] == 0
    assert naive["activations"] > 10 * naive["scratch"]
    assert ours["arenas"] > 5 * ours["activations"]
    batch_bytes = 16 * 3 * 32 * 32 * 4
    assert naive["activations"] > batch_bytes
    assert any("DenseLayer.forward" in holding.origin for holding in line_of(predictions["naive"]).holdings)


@pytest.mark.parametrize("numerics", ["fast", "exact"])
def test_memopts_requests_are_told_by_region_and_never_by_its_own_lines(numerics: str) -> None:
    config = memopt.Config(numerics=numerics, recompute="concat")
    prediction = predict(lambda: DenseNet(depth=16), X, apply=lambda model: memopt.apply(model, config=config))
    line = line_of(prediction)
    told = [holding.origin.split("  ")[1] for holding in line.holdings if "memopt's region" in holding.origin]
    # The largest feature maps are those of the first dense block, so the peak lies in its backward.
    assert {"forward of memopt's region 1", "backward of memopt's region 1"} <= set(told)
    assert {one[-1] for one in told} <= {"1", "2", "3"}
    assert not any(f"{name}.py:" in holding.origin for holding in line.holdings for name in RUNTIME)


def test_what_outlives_forward_is_an_activation_and_what_does_not_is_scratch() -> None:
    device = SimulatedDevice()
    device.allocate(1, Origin("parameter"))
    device.tag_all("parameters")
    for _ in range(2):
        device.mark(FORWARD_BEGINS)
        passing, saved = device.allocate(2, Origin("a")), device.allocate(3, Origin("b"))
        device.free(passing)
        device.free(device.allocate(4, Origin("workspace of c")))
        device.mark(BACKWARD_BEGINS)
        gradient = device.allocate(5, Origin("d"))
        device.free(saved)
        device.free(gradient)
        device.mark(STEP_ENDS)
    step = ["scratch", "activations", "workspaces", "scratch"]
    assert categorised(device.trace) == ["parameters", *step, *step]


def test_the_phases_of_a_step_come_in_order(predictions: dict[str, Prediction]) -> None:
    line = line_of(predictions["naive"])
    assert [name for name, _ in line.phases] == ["forward", "backward", "update"]
    starts = [at for _, at in line.phases]
    assert starts == sorted(starts)
    assert starts[0] == 0
    assert starts[2] < len(line.moments)


def test_a_thinned_timeline_keeps_the_peak_and_what_lives_there(predictions: dict[str, Prediction]) -> None:
    line = line_of(predictions["naive"])
    few = thinned(line, 50)
    assert len(few.moments) == 50
    assert (few.peak_bytes, few.holdings) == (line.peak_bytes, line.holdings)
    assert thinned(few, 50) is few
    share = few.phases[1][1] / len(few.moments)
    assert share == pytest.approx(line.phases[1][1] / len(line.moments), abs=0.03)

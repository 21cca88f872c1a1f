from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from memopt.measure import workspaces
from memopt.measure.predict import predict
from memopt.measure.target import Target
from memopt.measure.trace import BACKWARD_BEGINS
from memopt.measure.workspaces import ConvolutionCall, as_row, convolution_calls, estimated, measured

aten = torch.ops.aten
X = (torch.empty(8, 3, 64, 64, device="meta"),)
FORWARD = ConvolutionCall("forward", "float32", "contiguous", "8x3x64x64", "16x3x3x3", "1x1", "1x1", "1x1", "1")
RESULT_BYTES, INPUT_BYTES, WEIGHT_BYTES = 8 * 16 * 64 * 64 * 4, 8 * 3 * 64 * 64 * 4, 16 * 27 * 4


def make() -> nn.Module:
    return nn.Conv2d(3, 16, 3, padding=1, bias=False)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def table(size_bytes: str, call: ConvolutionCall = FORWARD, **elsewhere_bytes: str) -> None:
        sizes = {"": size_bytes, **elsewhere_bytes}
        rows = [as_row(call) | {"workspace_bytes": size, "gpu": gpu} for gpu, size in sizes.items()]
        path = tmp_path / "table.csv"
        path.write_text("".join(f"{','.join(line)}\n" for line in (rows[0], *(row.values() for row in rows))))
        monkeypatch.setattr(workspaces, "TABLE", path)
        forget()

    yield table
    forget()


def forget() -> None:
    measured.cache_clear()
    workspaces._by_kind.cache_clear()
    workspaces.estimated.cache_clear()


def test_a_convolution_is_known_by_all_that_its_workspace_may_depend_on() -> None:
    x, weight = torch.empty(*X[0].shape), torch.empty(16, 3, 3, 3)
    settings = (None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    (call,) = convolution_calls(aten.convolution.default, (x, weight, *settings))
    assert call == FORWARD
    assert call.operands_bytes == INPUT_BYTES + WEIGHT_BYTES + RESULT_BYTES
    last = x.to(memory_format=torch.channels_last)
    (call,) = convolution_calls(aten.convolution.default, (last, weight, *settings))
    assert call.layout == "channels_last"
    transposed = (None, [1, 1], [1, 1], [1, 1], True, [0, 0], 1)
    assert convolution_calls(aten.convolution.default, (x, weight, *transposed)) == ()
    assert convolution_calls(aten.mm.default, (x, weight)) == ()
    assert convolution_calls(aten.convolution.default, (x[:0], weight, *settings)) == ()


@pytest.mark.parametrize(
    ("mask", "operations"),
    [
        ((True, True, False), ["data gradient", "weight gradient"]),
        ((False, True, True), ["weight gradient"]),
        ((True, False, False), ["data gradient"]),
    ],
)
def test_backward_makes_the_passes_that_are_wanted(mask: tuple[bool, ...], operations: list[str]) -> None:
    x, weight, grad = torch.empty(8, 3, 64, 64), torch.empty(16, 3, 3, 3), torch.empty(8, 16, 64, 64)
    args = (grad, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, mask)
    calls = convolution_calls(aten.convolution_backward.default, args)
    assert [call.operation for call in calls] == operations
    assert all(call.operands_bytes == INPUT_BYTES + WEIGHT_BYTES + RESULT_BYTES for call in calls)


def test_what_was_measured_is_taken_and_given_back(table) -> None:
    table(str(100 * 2**20))
    prediction = predict(make, X)
    # Forward's workspace, while nothing but the batch and the result is there.
    step_bytes = INPUT_BYTES + RESULT_BYTES + 100 * 2**20
    assert prediction.figures.peak_allocated_bytes == pytest.approx(step_bytes, rel=0.01)
    assert prediction.figures.saved_bytes < 2 * RESULT_BYTES
    assert FORWARD not in prediction.unmeasured
    assert {call.operation for call in prediction.unmeasured} == {"weight gradient"}


def test_without_a_measurement_there_is_a_bound_beside_the_prediction(table) -> None:
    table("")
    prediction = predict(make, X)
    assert FORWARD in prediction.unmeasured
    more_bytes = prediction.largest.peak_allocated_bytes - prediction.figures.peak_allocated_bytes
    split_off_bytes = 2**20  # less than that is left with a block
    assert 0 < more_bytes <= FORWARD.bound_bytes + split_off_bytes
    assert prediction.largest.activation_peak_bytes == prediction.figures.activation_peak_bytes + more_bytes


def test_a_workspace_of_nothing_is_known_too(table) -> None:
    table("0")
    prediction = predict(make, X)
    assert FORWARD not in prediction.unmeasured
    assert "workspace of forward" not in map(str, prediction.trace.origins)
    assert any(name == BACKWARD_BEGINS for name, _ in prediction.trace.marks)


def test_what_was_not_measured_is_estimated_in_proportion_and_said_to_be(table) -> None:
    table(str(10 * 2**20))
    prediction = predict(make, (torch.empty(16, *X[0].shape[1:], device="meta"),))
    step_bytes = 2 * (INPUT_BYTES + RESULT_BYTES + 10 * 2**20)
    assert prediction.figures.peak_allocated_bytes == pytest.approx(step_bytes, rel=0.02)
    assert prediction.largest.peak_allocated_bytes > prediction.figures.peak_allocated_bytes
    assert replace(FORWARD, input="16x3x64x64") in prediction.unmeasured


def test_only_a_call_of_the_same_kind_says_anything(table) -> None:
    table("100")
    assert estimated(replace(FORWARD, input="4x3x64x64")) == 50
    for other in ({"weight": "16x3x1x1"}, {"dtype": "bfloat16"}, {"layout": "channels_last"}, {"stride": "2x2"}):
        assert estimated(replace(FORWARD, **other)) is None
    assert estimated(replace(FORWARD, operation="data gradient")) is None


def test_each_gpu_has_its_own_and_an_unknown_one_the_most(table) -> None:
    table("", one="100", other="300", third="")
    assert [measured(gpu)[FORWARD] for gpu in ("one", "other", "third", None)] == [100, 300, 300, 300]
    larger = replace(FORWARD, input="16x3x64x64")
    assert [estimated(larger, gpu) for gpu in ("one", "other", None)] == pytest.approx([200, 600, 600], abs=5)
    table("", one=str(100 * 2**20), other=str(300 * 2**20))
    for gpu, size_mib in (("one", 100), ("other", 300)):
        peak_bytes = predict(make, X, Target(gpu=gpu)).figures.peak_allocated_bytes
        assert peak_bytes == pytest.approx(INPUT_BYTES + RESULT_BYTES + size_mib * 2**20, rel=0.01)


def test_a_product_of_matrices_does_not_take_more_where_its_operands_are_larger(table) -> None:
    call = ConvolutionCall(
        "weight gradient", "float32", "channels_last", "64x1280x7x7", "640x1280x1x1", "1x1", "0x0", "1x1", "1"
    )
    table(str(16 * 2**20), call)
    assert call.is_product
    assert estimated(replace(call, input="64x6006x8x8", weight="3003x6006x1x1")) == 16 * 2**20
    for other in ({"layout": "contiguous"}, {"weight": "640x1280x3x3"}, {"stride": "2x2"}):
        assert not replace(call, **other).is_product


def test_of_several_calls_the_most_alike_says_it() -> None:
    forget()
    calls = [call for call in measured() if call.weight.endswith("3x3") and measured()[call] > 0]
    assert calls
    assert all(estimated(call) == measured()[call] for call in calls)


def test_no_row_of_the_committed_table_is_above_the_upper_bound() -> None:
    forget()
    assert len(measured()) > 1000
    assert all(0 <= size <= call.bound_bytes for call, size in measured().items())

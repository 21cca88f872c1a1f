from pathlib import Path

import torch
from torch import nn

from memopt.ir import MIB
from memopt.measure.allocator import CachingAllocator
from memopt.measure.predict import predict
from memopt.measure.trace import Origin, SimulatedDevice, origin_of, replay, segments_after


def test_a_replayed_trace_has_the_figures_of_the_device_that_recorded_it() -> None:
    device = SimulatedDevice()
    first = device.allocate(30 * MIB, Origin("a"))
    device.allocate(MIB, Origin("b"))
    device.free(first)
    device.allocate(12 * MIB, Origin("c"))
    allocator = CachingAllocator()
    deltas = [30 * MIB, MIB, -30 * MIB, 12 * MIB]
    assert list(replay(device.trace, allocator)) == list(enumerate(deltas))
    assert allocator.allocated_bytes == device.current_bytes == 13 * MIB
    assert allocator.peak_allocated_bytes == device.peak_bytes == 31 * MIB
    assert allocator.reserved_bytes == 32 * MIB


def test_a_request_that_may_not_be_made_is_served_on_demand_only() -> None:
    device = SimulatedDevice()
    device.might_allocate(30 * MIB, Origin("workspace"))
    device.allocate(MIB, Origin("a"))
    assert device.peak_bytes == MIB
    allocator = CachingAllocator()
    list(replay(device.trace, allocator, bounds=True))
    assert (allocator.reserved_bytes, allocator.allocated_bytes) == (32 * MIB, MIB)


def test_segments_at_a_moment_name_the_requests_that_live_there() -> None:
    device = SimulatedDevice()
    first = device.allocate(30 * MIB, Origin("a"))
    device.free(first)
    second = device.allocate(12 * MIB, Origin("b"))
    assert [block.owner for block in segments_after(device.trace, 0)[0].blocks] == [first]
    assert [block.owner for block in segments_after(device.trace, 2)[0].blocks] == [second, None]
    assert segments_after(device.trace, 2)[0].free_bytes == 18 * MIB


def test_an_origin_names_the_innermost_function_outside_torch_and_this_room() -> None:
    origin = origin_of("aten.cat.default")
    assert str(origin).startswith("aten.cat.default  test_trace.py:")
    assert str(origin).endswith("test_an_origin_names_the_innermost_function_outside_torch_and_this_room")


def test_what_no_line_of_the_model_asks_for_has_the_operator_alone_for_origin() -> None:
    model = nn.Sequential(nn.Linear(1000, 1000), nn.ReLU())
    origins = set(map(str, predict(lambda: model, (torch.empty(8, 1000, device="meta"),)).trace.origins))
    assert "made before the step" in origins
    assert not any(Path(__file__).name in origin for origin in origins), "nor a line of whoever predicts"


class Twice(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


def test_a_line_of_the_model_is_named() -> None:
    prediction = predict(lambda: nn.Sequential(nn.Linear(8, 8), Twice()), (torch.empty(8, 8, device="meta"),))
    assert any("Twice.forward" in str(origin) for origin in prediction.trace.origins)

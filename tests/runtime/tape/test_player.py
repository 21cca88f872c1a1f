"""A tape does what the function that it was made from does, in memory that it has settled beforehand."""

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from memopt.measure.tracker import StorageTracker
from memopt.runtime.tape import NotTapedError, Tape, described, record

Function = Callable[[list[torch.Tensor]], Any]
LARGE = 300_000


def _everything(tensors: list[torch.Tensor]) -> Any:
    x, y = tensors
    zeros = torch.zeros(4, 3)
    zeros[1:] += x.t()[1:4, :1].expand(3, 3)
    room = torch.empty(2, 4, 6)
    room[0].copy_(x)
    room[1].copy_(y)
    torch._foreach_mul_([room[0], room[1]], 2.0)
    both = room.permute(1, 0, 2).reshape(4, 12)
    values, indices = both.max(1)
    bias = torch.zeros(LARGE)
    bias[: values.numel()] += values
    small = torch.empty_like(values).copy_(values)
    turned = torch.empty_like(values[:3]).copy_(values[1:]).unsqueeze_(0).t_()
    out = torch.empty(6, 4).t().copy_(x - y)
    return [out, None, both.sum(), indices, zeros, turned.expand(3, 2).clone()], [bias, small, small[1:3], x[1]]


def _inputs(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 6, generator=generator) for _ in range(2)]


def taped(function: Function, inputs: list[torch.Tensor]) -> Tape:
    return Tape(record(function, list(map(described, inputs))))


def same(one: Any, other: Any) -> bool:
    return len(one) == len(other) and all(
        (a is None and b is None) or (torch.equal(a, b) and a.stride() == b.stride() and a.dtype == b.dtype)
        for a, b in zip(one, other, strict=True)
    )


def test_a_tape_does_what_was_recorded() -> None:
    tape = taped(_everything, _inputs())
    for seed in (1, 2):
        outputs, buffers = tape.play(_inputs(seed))
        expected_outputs, expected_saved = _everything(_inputs(seed))
        assert same(outputs, expected_outputs)
        assert same(tape.saved(buffers), expected_saved)


def test_what_a_play_hands_out_is_its_own() -> None:
    tape = taped(_everything, _inputs())
    outputs, buffers = tape.play(_inputs(1))
    results = [*(o for o in outputs if o is not None), *tape.saved(buffers)]
    before = [t.clone() for t in results]
    tape.play(_inputs(2))
    assert all(torch.equal(a, b) for a, b in zip(before, results, strict=True))


def test_an_output_that_is_a_whole_tensor_is_no_view() -> None:
    outputs, _ = taped(_everything, _inputs()).play(_inputs())
    assert not any(o._is_view() for o in outputs if o is not None)


def test_passing_tensors_share_one_buffer_and_are_gone_afterwards() -> None:
    def chain(tensors: list[torch.Tensor]) -> Any:
        x = tensors[0]
        for _ in range(10):
            x = torch.empty_like(x).copy_(x).add_(1.0)
        return [torch.empty(1).copy_(x.view(-1)[:1])], []

    inputs = [torch.zeros(1000, 1024)]
    tape = taped(chain, inputs)
    with StorageTracker() as tracker:
        outputs, _ = tape.play(inputs)
        assert tracker.peak_bytes <= 2 * inputs[0].nbytes + 10_000
        assert tracker.current_bytes == 4
    assert outputs[0] is not None
    assert outputs[0].item() == 10.0


def test_results_of_operators_are_let_go_after_their_last_use() -> None:
    def chain(tensors: list[torch.Tensor]) -> Any:
        x = tensors[0]
        for _ in range(10):
            x = x + 1.0
        return [x.sum()], []

    inputs = [torch.zeros(1000, 1024)]
    tape = taped(chain, inputs)
    with StorageTracker() as tracker:
        tape.play(inputs)
        assert tracker.peak_bytes <= 2 * inputs[0].nbytes + 10_000


def test_random_numbers_are_drawn_anew() -> None:
    tape = taped(lambda tensors: ([torch.empty_like(tensors[0]).bernoulli_(0.5)], []), _inputs())
    torch.manual_seed(3)
    first, second = (tape.play(_inputs())[0][0] for _ in range(2))
    torch.manual_seed(3)
    expected = torch.empty(4, 6).bernoulli_(0.5)
    assert first is not None
    assert second is not None
    assert torch.equal(first, expected)
    assert not torch.equal(first, second)


def test_recording_draws_no_numbers_and_is_seen_by_no_mode() -> None:
    class Nothing(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            raise AssertionError(func)

    state = torch.get_rng_state()
    inputs = list(map(described, _inputs()))
    with Nothing():
        record(lambda tensors: ([torch.empty_like(tensors[0]).bernoulli_(0.5)], []), inputs)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_tensor_from_elsewhere_is_refused() -> None:
    other = torch.ones(6)
    with pytest.raises(NotTapedError, match="elsewhere"):
        record(lambda tensors: ([torch.empty(6).copy_(other)], []), list(map(described, _inputs())))


def test_the_value_of_a_tensor_is_refused() -> None:
    with pytest.raises(NotTapedError, match="value"):
        record(lambda tensors: ([tensors[0] * tensors[1].sum().item()], []), list(map(described, _inputs())))


@pytest.fixture
def turning() -> Iterator[Any]:
    """An operator whose result lies otherwise than its fake says."""
    library = torch.library.Library("memopt_test", "DEF")
    library.define("turned(Tensor x) -> Tensor")
    library.impl("turned", lambda x: x.t().contiguous().t(), "CPU")
    torch.library.register_fake("memopt_test::turned", torch.empty_like, lib=library)
    yield torch.ops.memopt_test.turned.default
    library._destroy()


def test_a_result_that_lies_otherwise_is_laid_out_anew(turning: Any) -> None:
    tape = taped(lambda tensors: ([turning(tensors[0])[1:] * 1.0, turning(tensors[1])], []), _inputs())
    x, y = _inputs(1)
    outputs, _ = tape.play([x, y])
    assert same(outputs, [x[1:], y])


def test_a_result_that_nobody_asked_for_is_left_aside() -> None:
    """This convolution's backward makes a weight gradient of a shape of its own although it was told not to."""

    def gradients(tensors: list[torch.Tensor]) -> Any:
        mask = [True, False, True]
        x, _, bias = torch.ops.aten.convolution_backward(*tensors, [4], [1], [1], [1], False, [0], 1, mask)
        return [x, bias], []

    inputs = [torch.randn(4, 4, 24), torch.randn(4, 5, 24), torch.randn(4, 5, 3)]
    assert same(taped(gradients, inputs).play(inputs)[0], gradients(inputs)[0])


def test_a_tape_keeps_nothing_alive() -> None:
    inputs = _inputs()
    tape = taped(_everything, inputs)
    gc.collect()
    gc.disable()
    try:
        with StorageTracker() as tracker:
            tracker.track(inputs)
            before_bytes = tracker.current_bytes
            tape.play(inputs)
            assert tracker.current_bytes == before_bytes
    finally:
        gc.enable()

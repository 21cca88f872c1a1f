"""Recording: what a forward may do, what is refused with the user's line, and that no state changes."""

import gc
import logging
import random
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from memopt.capture import capture
from memopt.errors import CaptureError


class Net(nn.Module):
    def __init__(self, body: Callable[..., Any]) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.counter = 0
        self.seen: list[torch.Tensor] = []
        self.register_buffer("scale", torch.ones(1))
        self.body = body

    def forward(self, x: torch.Tensor, **options: Any) -> Any:
        return self.body(self, x, **options)


def _record(body: Callable[..., Any], **options: Any) -> tuple[Net, Any]:
    net = Net(body)
    captured = capture(net, net.forward, (torch.randn(2, 3, 4, 4),), options)
    return net, captured


def test_python_sees_tensors_shapes_and_flags() -> None:
    def body(net: Net, x: torch.Tensor, double: bool = False) -> torch.Tensor:
        assert isinstance(x, torch.Tensor)
        parts = [x] * (2 if double else 1)
        if x.shape[1] == 3 and len(x) == 2 and x.dim() == 4 and not x.requires_grad:
            parts.append(net.norm(x))
        return torch.cat(parts, dim=1)

    _, captured = _record(body, double=True)

    (concat,) = [node for node in captured.graph.nodes if node.target is torch.cat]
    assert len(concat.args[0]) == 3
    assert "test_recorder.py:" in concat.meta["source"]


def test_recording_changes_no_state() -> None:
    net, _ = _record(lambda net, x: net.norm(x) * net.scale)

    assert int(net.norm.num_batches_tracked) == 0
    assert torch.equal(net.norm.running_mean, torch.zeros(3))
    assert type(net.norm.weight) is nn.Parameter


def test_nothing_outlives_a_recording() -> None:
    """A graph that held its own activations would count as memory where a step on fake tensors is measured."""
    net = Net(lambda net, x: F.relu(net.norm(x), inplace=True).square().sum())
    captured = capture(net, net.forward, (torch.randn(2, 3, 4, 4),), {})
    results = [weakref.ref(node.meta["val"]) for node in captured.graph.nodes if "val" in node.meta]
    assert len(results) >= 4

    del captured
    gc.collect()

    assert [result() for result in results] == [None] * len(results)


def test_a_forward_that_differentiates_is_refused() -> None:
    def body(net: Net, x: torch.Tensor) -> torch.Tensor:
        y = net.norm(x).square().sum()
        return torch.autograd.grad(y, net.norm.weight)[0]

    with pytest.raises(CaptureError, match="differentiates"):
        _record(body)


def test_an_identity_leaves_no_trace() -> None:
    net = Net(lambda net, x: net.norm(net.nothing(x)))
    net.nothing = nn.Identity()
    captured = capture(net, net.forward, (torch.randn(2, 3, 4, 4),), {})
    assert [node.op for node in captured.graph.nodes] == ["placeholder", "call_module", "output"]

    net.nothing.register_forward_hook(lambda *_: None)
    captured = capture(net, net.forward, (torch.randn(2, 3, 4, 4),), {})
    assert [node.target for node in captured.graph.nodes if node.op == "call_module"] == ["nothing", "norm"]


def test_a_failing_operation_is_one_error_and_no_log(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    logger.addHandler(caplog.handler)
    try:
        with pytest.raises(CaptureError, match="fails on tensors without data"):
            _record(lambda net, x: x + x[:, :, :3])
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.records
    assert not logger.disabled


def _data_dependent(net: Net, x: torch.Tensor) -> torch.Tensor:
    return x if x.sum() > 0 else -x


def _counts(net: Net, x: torch.Tensor) -> torch.Tensor:
    net.counter += 1
    return net.norm(x)


def _keeps(net: Net, x: torch.Tensor) -> torch.Tensor:
    net.seen.append(x)
    return net.norm(x)


def _assigns(net: Net, x: torch.Tensor) -> torch.Tensor:
    net.scale = net.scale * 2
    return net.norm(x)


def _leaves_a_tensor(net: Net, x: torch.Tensor) -> torch.Tensor:
    net.last = x
    return net.norm(x)


def _draws(net: Net, x: torch.Tensor) -> torch.Tensor:
    return x if random.random() < 2 else -x


def _under_inference_mode(net: Net, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        x = x * 2
    return net.norm(x)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return -grad


doubled = Doubled.apply


def _calls_a_renamed_function(net: Net, x: torch.Tensor) -> torch.Tensor:
    return net.norm(doubled(net.norm(x)))


def test_an_autograd_function_is_one_node() -> None:
    _, captured = _record(lambda net, x: Doubled.apply(net.norm(x)))

    *_, function, _ = captured.graph.nodes
    assert function.op == "call_function"
    assert function.meta["val"].requires_grad


def test_blocks_of_no_grad_and_autocast_are_part_of_the_graph() -> None:
    def body(net: Net, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            x = net.norm(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.relu(net.norm(x))

    _, captured = _record(body)

    called = [getattr(node.target, "__name__", node.target) for node in captured.graph.nodes if node.target]
    switches = [name for name in called if "set_" in name or "autocast" in name]
    assert switches == ["set_gradients", "set_gradients", "enter_autocast", "exit_autocast"]


STRAY = torch.ones(3)


def _stray(net: Net, x: torch.Tensor) -> torch.Tensor:
    return net.norm(x) * STRAY[0]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (_data_dependent, r"test_recorder\.py:\d+: forward needs the value of a tensor"),
        (_counts, "changes self.counter"),
        (_keeps, "changes self.seen"),
        (_assigns, "assigns to self.scale"),
        (_leaves_a_tensor, "assigns to self.last"),
        (_draws, "draws random numbers outside torch"),
        (_under_inference_mode, r"test_recorder\.py:\d+: forward switches autocast or inference mode"),
        (_calls_a_renamed_function, r"test_recorder\.py:\d+: a tensor made without gradients has one"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_a_recording_would_freeze_is_refused_and_put_back(body: Callable[..., Any], reason: str) -> None:
    net = Net(body)
    random_state = random.getstate()
    scale = net.scale

    with pytest.raises(CaptureError, match=reason):
        capture(net, net.forward, (torch.randn(2, 3, 4, 4),), {})

    assert random.getstate() == random_state
    assert (net.counter, net.seen) == (0, [])
    assert net.scale is scale
    assert not hasattr(net, "last")
    assert type(net.norm.weight) is nn.Parameter


class OtherThread(threading.Thread):
    """Calls a module and keeps what kind of thing came out."""

    def run(self) -> None:
        self.seen = type(nn.Linear(2, 2)(torch.ones(1, 2))).__name__


def test_other_threads_run_their_modules_as_usual() -> None:
    def body(net: Net, x: torch.Tensor) -> torch.Tensor:
        thread = OtherThread()
        thread.start()
        thread.join()
        assert thread.seen == "Tensor"
        return net.norm(x)

    _record(body)


def test_what_an_input_requires_leaves_no_trace() -> None:
    net = Net(lambda net, x: net.norm(x) * x)
    captured = capture(net, net.forward, (torch.randn(2, 3, 4, 4, requires_grad=True),), {})

    assert [node.op for node in captured.graph.nodes] == ["placeholder", "call_module", "call_method", "output"]

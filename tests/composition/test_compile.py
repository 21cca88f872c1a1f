"""`torch.compile` after `apply`: what surrounds the model is compiled, the model stays small, nothing recompiles."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.testing import CompileCounterWithBackend

import memopt
from memopt.measure.tracker import StorageTracker
from tests.helpers import assert_rewritten, assert_same, dense_net, images, rewritten_copy, state_of

# Dynamo looks at every tensor's `.grad` and hides the warning, which pytest has made an error by then.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")

Forward = Callable[[torch.Tensor], torch.Tensor]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def loss_of(model: nn.Module) -> Forward:
    """What people compile: normalisation of the images, the model, the loss."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        y = model((x - 0.4) / 0.2)
        return F.cross_entropy(y, torch.arange(len(x)) % y.shape[1])

    return forward


def trained(model: nn.Module, forward: Forward, steps: int = 4) -> dict[str, torch.Tensor | None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = forward(images(3, seed=step))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return state_of(model) | {"losses": torch.stack(losses)}


def test_numbers_are_equal_and_nothing_recompiles_after_the_second_step() -> None:
    naive, model = dense_net(), rewritten_copy(dense_net())
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss_of(model), backend=counter)

    expected = trained(naive, loss_of(naive), steps=6)
    for _ in range(2):
        compiled(images(3)).backward()
    frames = counter.frame_count
    model.load_state_dict(dense_net().state_dict())

    assert_same(expected, trained(model, compiled, steps=6))
    assert 0 < frames == counter.frame_count
    assert_rewritten(model, 7)


def peak_bytes(model: nn.Module, forward: Forward) -> int:
    """Activation peak of the third step."""
    x = images(4, 12)
    for _ in range(2):
        forward(x).backward()
        model.zero_grad()
    with StorageTracker() as tracker:
        tracker.track(model, x)
        before = tracker.current_bytes
        tracker.reset_peak()
        forward(x).backward()
        return tracker.peak_bytes - before


@pytest.mark.parametrize("what", ["model", "step"])
def test_the_activation_peak_is_the_one_without_compile(what: str) -> None:
    def compiled(model: nn.Module) -> Forward:
        if what == "model":
            return loss_of(torch.compile(model, backend=aot_eager))
        return torch.compile(loss_of(model), backend=aot_eager)

    naive, plain, model = dense_net(growth=8), memopt.apply(dense_net(growth=8)), memopt.apply(dense_net(growth=8))
    without = peak_bytes(plain, loss_of(plain))

    assert peak_bytes(model, compiled(model)) <= 1.05 * without
    assert without < 0.6 * peak_bytes(naive, loss_of(naive))

"""Verification where a whole step of the untouched model does not fit in memory."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import pytest
import torch
from torch import nn

import memopt
from densenet_models import bc, growing
from memopt import verify
from memopt.measure.trace import Origin
from memopt.measure.tracker import StorageTracker
from memopt.runtime.fused import backward
from memopt.runtime.ops.convolution import Convolution
from memopt.verify import RECOMPUTED
from tests.helpers import assert_trains_alike, images, reasons

KEEPS_TOO_MUCH = 30 * 2**20
"""Bytes: a step of a 76-layer network that keeps its activations of two images takes more."""


class Device:
    """Has so many bytes and no more."""

    def __init__(self, capacity_bytes: int) -> None:
        self.free_bytes = capacity_bytes
        self.refused = 0
        self._sizes: list[int] = []

    def allocate(self, size_bytes: int, origin: Origin) -> int:
        if size_bytes > self.free_bytes:
            self.refused += 1
            raise torch.OutOfMemoryError(f"{size_bytes} bytes of {self.free_bytes}")
        self.free_bytes -= size_bytes
        self._sizes.append(size_bytes)
        return len(self._sizes) - 1

    def free(self, number: int) -> None:
        self.free_bytes += self._sizes[number]


@contextmanager
def little_memory(capacity_bytes: int) -> Iterator[Device]:
    device = Device(capacity_bytes)
    with StorageTracker(device=device):
        yield device


def deep(family: Callable[..., nn.Module] = bc.DenseNet) -> nn.Module:
    torch.manual_seed(0)
    return family(depth=76)


@pytest.mark.parametrize("family", [bc.DenseNet, growing.DenseNet])
def test_a_model_is_verified_in_less_memory_than_its_naive_step_takes(family: Callable[..., nn.Module]) -> None:
    model = deep(family)
    with little_memory(KEEPS_TOO_MUCH) as device:
        memopt.apply(model, example_inputs=images(size=32))

    assert device.refused == 1
    assert RECOMPUTED in memopt.explain(model).notes
    assert "Not verified" not in reasons(model)
    assert_trains_alike(deep(family), model, images(size=32), steps=1)


def test_what_cannot_fit_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    trials = verify._first_that_fits
    monkeypatch.setattr(verify, "_first_that_fits", lambda given, few: tried.append(len(given)) or trials(given, few))
    naive = bc.DenseNet(depth=22)
    x = images(8)
    kept_bytes = sum(c.saved_bytes for c in memopt.explain(memopt.apply(copy.deepcopy(naive), x)).chains) / 4
    for capacity_bytes, count in ((kept_bytes - 1, 1), (kept_bytes + 1, 2)):
        tried.clear()
        monkeypatch.setattr(verify, "_capacity_bytes", lambda model, most=capacity_bytes: most)
        notes = memopt.explain(memopt.apply(copy.deepcopy(naive), x)).notes
        assert tried == [count]
        assert (RECOMPUTED in notes) == (count == 1)


def test_where_memory_suffices_nothing_is_recomputed() -> None:
    model = deep()
    with little_memory(100 * KEEPS_TOO_MUCH):
        memopt.apply(model, example_inputs=images(size=32))

    assert RECOMPUTED not in memopt.explain(model).notes


def test_where_even_that_does_not_fit_nothing_is_verified() -> None:
    model = deep()
    with little_memory(KEEPS_TOO_MUCH // 3) as device:
        memopt.apply(model, example_inputs=images(size=32))

    assert device.refused == 2
    assert "Not verified: the comparison" in reasons(model)
    assert memopt.explain(model).applied


FAULTY = 72
"""Channels that one layer of the network reads, the fifth of its first block, and no other."""


@pytest.mark.parametrize("capacity_bytes", [KEEPS_TOO_MUCH, 100 * KEEPS_TOO_MUCH], ids=["little", "enough"])
def test_a_wrong_layer_is_found_and_named(capacity_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Convolution.backward

    def wrong(self: Convolution, grad: torch.Tensor, x: torch.Tensor, *rest: Any) -> Any:
        gradients = honest(self, grad, x, *rest)
        return gradients if x.shape[1] != FAULTY else tuple(None if g is None else g * 1.0001 for g in gradients)

    monkeypatch.setattr(Convolution, "backward", wrong)
    model = deep()
    names = {m.in_channels: name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    layer = names[FAULTY].rpartition(".")[0]

    with little_memory(capacity_bytes), pytest.raises(memopt.EquivalenceError) as error:
        memopt.apply(model, example_inputs=images(size=32))

    assert f"The first chain that differs is cat_4 ({layer}." in str(error.value)
    assert "bc.py:" in str(error.value)
    assert type(model) is bc.DenseNet


def test_fused_numbers_are_judged_by_float64_in_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    config = memopt.Config(numerics="fast")
    monkeypatch.setattr(verify, "SEEDS", 1)
    with little_memory(KEEPS_TOO_MUCH) as device:
        model = memopt.apply(bc.DenseNet(depth=40), example_inputs=images(size=32), config=config)
    assert device.refused == 1
    assert RECOMPUTED in memopt.explain(model).notes
    assert {chain.numerics for chain in memopt.explain(model).chains} == {"fast"}

    finish = backward.finish_norm
    monkeypatch.setattr(backward, "finish_norm", lambda *args: finish(*args[:4], args[4] + 1, *args[5:]))
    with little_memory(KEEPS_TOO_MUCH), pytest.raises(memopt.EquivalenceError, match="in units of eager's own"):
        memopt.apply(bc.DenseNet(depth=40), example_inputs=images(size=32), config=config)


def test_fused_numbers_are_judged_on_both_batch_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    finish = backward.finish_norm

    def wrong_for_three_samples(*args: Any) -> None:
        finish(*args[:4], args[4] + (args[4] % 3 == 0), *args[5:])

    monkeypatch.setattr(backward, "finish_norm", wrong_for_three_samples)
    with pytest.raises(memopt.EquivalenceError, match="in units of eager's own"):
        memopt.apply(bc.DenseNet(depth=40), example_inputs=images(size=32), config=memopt.Config(numerics="fast"))


@pytest.mark.parametrize(("numerics", "copies"), [("exact", 2), ("fast", 4)])
def test_few_copies_are_made(numerics: Literal["exact", "fast"], copies: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The untouched and the rewritten one serve all comparisons; one in float64 for each mode joins them."""
    made: list[type] = []
    deepcopy = copy.deepcopy

    def counting(value: Any, *memo: Any) -> Any:
        if isinstance(value, bc.DenseNet):
            made.append(type(value))
        return deepcopy(value, *memo)

    monkeypatch.setattr(copy, "deepcopy", counting)
    memopt.apply(bc.DenseNet(depth=16), example_inputs=images(size=16), config=memopt.Config(numerics=numerics))
    assert len(made) == copies


@pytest.mark.parametrize("size", [32, 96])
def test_the_users_random_numbers_are_as_without_memopt(size: int) -> None:
    """Large images are cut down to be verified, which the untouched model is asked whether it takes."""
    model = bc.DenseNet(depth=10, growth_rate=4, drop_rate=0.2)
    x = torch.randn(2, 3, size, size)
    before = torch.random.get_rng_state()
    memopt.apply(model, x)
    assert torch.equal(torch.random.get_rng_state(), before)

"""A region played from its tapes has the bits of one that runs step by step, whatever its gradients look like."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import memopt
from densenet_models import bc, growing, plain, signal
from memopt.runtime.fused import tapes
from memopt.runtime.fused.tapes import Tapes
from tests.helpers import LEVELS, dense_net, images, train_step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "bc": (partial(bc.DenseNet, depth=16, drop_rate=0.2), (4, 3, 16, 16)),
    "imagenet stem": (partial(bc.DenseNet, block_config=(2, 3), growth_rate=8, small_inputs=False), (2, 3, 64, 64)),
    "prepended": (partial(growing.DenseNet, depth=16, growth_rate=5, prepend=True), (4, 3, 16, 16)),
    "plain": (partial(plain.DenseNet, depth=10, growth_rate=8, drop_rate=0.1), (4, 3, 16, 16)),
    "signal": (signal.DenseNet, (4, 12, 128)),
}
Train = Callable[[nn.Module], dict[str, Any]]


def fast(model: nn.Module, level: str = "layer") -> nn.Module:
    return memopt.apply(copy.deepcopy(model), config=memopt.Config(numerics="fast", recompute=level))


def assert_same_bits(naive: nn.Module, train: Train, monkeypatch: pytest.MonkeyPatch, level: str = "layer") -> None:
    played: list[object] = []
    play = tapes.ForwardTape.play
    monkeypatch.setattr(tapes.ForwardTape, "play", lambda self, *rest: played.append(self) or play(self, *rest))
    by_tape = train(fast(naive, level))
    assert played
    monkeypatch.setattr(Tapes, "find", lambda *arguments: None)
    step_by_step = train(fast(naive, level))
    assert by_tape.keys() == step_by_step.keys()
    for name, value in step_by_step.items():
        assert (value is None and by_tape[name] is None) or torch.equal(by_tape[name], value), name


def _steps(x: torch.Tensor, model: nn.Module) -> dict[str, Any]:
    results: dict[str, Any] = {}
    torch.manual_seed(4)
    for step in range(3):  # buffers and parameters change
        results |= {f"{step} {name}": value for name, value in train_step(model, (x + step,)).items()}
    return results


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", MODELS)
def test_same_bits_as_step_by_step(name: str, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, shape = MODELS[name]
    torch.manual_seed(0)
    naive = make().to(DEVICE)
    x = torch.randn(shape, device=DEVICE)
    assert_same_bits(naive, partial(_steps, x), monkeypatch, level)


def test_same_bits_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    def train(model: nn.Module) -> dict[str, Any]:
        with torch.autocast(DEVICE, torch.bfloat16):
            first = model(images().to(DEVICE)).float().square().sum()
        second = model(images(seed=1).to(DEVICE)).square().sum()  # the same model without
        (first + second).backward()
        return {name: p.grad for name, p in model.named_parameters()}

    assert_same_bits(dense_net().to(DEVICE), train, monkeypatch)


def _gradients(model: nn.Module) -> dict[str, Any]:
    return {name: p.grad for name, p in model.named_parameters()}


def _expanded(model: nn.Module) -> dict[str, Any]:
    model(images().to(DEVICE)).sum().backward()
    return _gradients(model)


def _some_parameters(model: nn.Module) -> dict[str, Any]:
    wanted = [p for n, p in model.named_parameters() if "conv1" in n]
    grads = torch.autograd.grad(model(images().to(DEVICE)).square().sum(), wanted)
    model(images().to(DEVICE)).square().sum().backward()
    return {str(n): grad for n, grad in enumerate(grads)} | _gradients(model)


def _frozen_midway(model: nn.Module) -> dict[str, Any]:
    model(images().to(DEVICE)).square().sum().backward()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("block1" not in name)
    model(images().to(DEVICE)).square().sum().backward()
    return _gradients(model)


def _offloaded(model: nn.Module) -> dict[str, Any]:
    """Unpacking gives contiguous tensors, whatever was packed."""
    model.to(memory_format=torch.channels_last)
    x = images().to(DEVICE).contiguous(memory_format=torch.channels_last)
    for _ in range(2):
        with torch.autograd.graph.save_on_cpu():
            loss = model(x).square().sum()
        loss.backward()
        model(x).square().sum().backward()
    return _gradients(model)


def _replaced_tensors(model: nn.Module) -> dict[str, Any]:
    """Weights and running statistics that are other tensors at the next step, weights of another layout."""
    model(images().to(DEVICE)).square().sum().backward()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    model.to(memory_format=torch.channels_last)
    model.zero_grad()
    model(images().to(DEVICE)).square().sum().backward()
    return _gradients(model) | dict(model.named_buffers())


@pytest.mark.parametrize("train", [_expanded, _some_parameters, _frozen_midway, _offloaded, _replaced_tensors])
def test_ways_to_train(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_same_bits(dense_net().to(DEVICE), train, monkeypatch)


def test_a_cumulative_average_runs_step_by_step() -> None:
    """It reads a counter, which a tape cannot."""
    naive = dense_net().to(DEVICE)
    for module in naive.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    rewritten = fast(naive)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for seed in range(2):
            for model in (naive, rewritten):
                model(images(seed=seed).to(DEVICE))
    for name, buffer in naive.named_buffers():
        torch.testing.assert_close(dict(rewritten.named_buffers())[name], buffer, rtol=1e-5, atol=1e-7)


def test_one_tape_serves_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    record = tapes.record
    monkeypatch.setattr(tapes, "record", lambda *arguments: made.append(None) or record(*arguments))
    model = fast(dense_net().to(DEVICE))
    counts = []
    for seed in range(3):
        model(images(seed=seed).to(DEVICE)).square().sum().backward()
        counts.append(len(made))
    assert counts[0] == counts[1] == counts[2] > 0


def test_a_head_of_one_position_is_recorded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradient's strides where a size is 1 are the loss's choice."""
    made: list[object] = []
    record = tapes.record
    monkeypatch.setattr(tapes, "record", lambda *arguments: made.append(None) or record(*arguments))
    naive = bc.DenseNet(depth=10).to(DEVICE)
    x = images().to(DEVICE)
    model = fast(naive)
    train_step(model, (x,))
    assert len(made) == 2 * len({chain.region for chain in memopt.explain(model).rewritten})


def test_the_default_dtype_does_not_matter() -> None:
    naive, x = dense_net().to(DEVICE), images().to(DEVICE)
    results = []
    for default in (torch.float32, torch.float64):
        model = fast(naive)
        torch.set_default_dtype(default)
        try:
            results.append(train_step(model, (x,)))
        finally:
            torch.set_default_dtype(torch.float32)
    for name, value in results[0].items():
        assert (value is None and results[1][name] is None) or torch.equal(value, results[1][name]), name

"""Hooks on modules fire exactly as in eager, registered before `apply` or after it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules import module as global_hooks
from torch.utils.hooks import RemovableHandle

import memopt
from memopt.measure.bits import same_bits
from tests.helpers import (
    DenseNet,
    assert_rewritten,
    assert_same,
    dense_net,
    images,
    reasons,
    rewritten_copy,
    train_step,
)

Log = list[tuple[str, torch.Tensor]]
Register = Callable[[nn.Module, Log], RemovableHandle]

PLACES: dict[str, Callable[[DenseNet], nn.Module]] = {
    "norm": lambda model: model.block1.layers[1].norm1,
    "activation": lambda model: model.block1.layers[1].relu1,
    "convolution": lambda model: model.block1.layers[1].conv2,
    "layer": lambda model: model.block1.layers[1],
    "block": lambda model: model.block1,
    "transition": lambda model: model.transition,
    "stem": lambda model: model.stem,
    "root": lambda model: model,
}


def first(value: Any) -> torch.Tensor:
    while isinstance(value, tuple | list):
        value = value[0]
    return value.detach().clone()


def forward_hook(module: nn.Module, log: Log) -> RemovableHandle:
    return module.register_forward_hook(lambda m, args, out: log.append(("forward", first(out))))


def forward_hook_that_changes(module: nn.Module, log: Log) -> RemovableHandle:
    return module.register_forward_hook(lambda m, args, out: log.append(("forward", first(out))) or out * 1.5)


def forward_hook_with_kwargs(module: nn.Module, log: Log) -> RemovableHandle:
    def hook(m: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        log.append(("kwargs", first(out)))

    return module.register_forward_hook(hook, with_kwargs=True)


def pre_hook(module: nn.Module, log: Log) -> RemovableHandle:
    return module.register_forward_pre_hook(lambda m, args: log.append(("before", first(args))))


def full_backward_hook(module: nn.Module, log: Log) -> RemovableHandle:
    return module.register_full_backward_hook(lambda m, grads, out: log.append(("backward", first(out))))


def full_backward_pre_hook(module: nn.Module, log: Log) -> RemovableHandle:
    return module.register_full_backward_pre_hook(lambda m, out: log.append(("before backward", first(out))))


def backward_hook_that_changes(module: nn.Module, log: Log) -> RemovableHandle:
    def hook(m: nn.Module, grads: Any, out: Any) -> Any:
        log.append(("backward", first(out)))
        return tuple(None if grad is None else grad * 0.5 for grad in grads)

    return module.register_full_backward_hook(hook)


KINDS: dict[str, Register] = {
    "forward": forward_hook,
    "forward, changing": forward_hook_that_changes,
    "forward, kwargs": forward_hook_with_kwargs,
    "pre": pre_hook,
    "backward": full_backward_hook,
    "backward, changing": backward_hook_that_changes,
    "backward pre": full_backward_pre_hook,
}


def without_in_place(model: DenseNet) -> DenseNet:
    """Full backward hooks forbid in-place changes of what a module returns, in eager too."""
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return model


def assert_same_logs(expected: Log, actual: Log) -> None:
    assert [name for name, _ in expected] == [name for name, _ in actual]
    assert expected
    assert all(same_bits(a, b) for (_, a), (_, b) in zip(expected, actual, strict=True))


def hooked_alike(naive: nn.Module, rewritten: nn.Module, place: str, register: Register, x: torch.Tensor) -> None:
    """Two steps with a hook, one without it again."""
    logs: tuple[Log, Log] = ([], [])
    handles = [register(PLACES[place](model), log) for model, log in zip((naive, rewritten), logs, strict=True)]
    for _ in range(2):
        assert_same(
            *(train_step(model, (x,), input_gradients=place in ("root", "stem")) for model in (naive, rewritten))
        )
        assert_same_logs(*logs)
    for handle in handles:
        handle.remove()
    count = len(logs[1])
    assert_same(train_step(naive, (x,)), train_step(rewritten, (x,)))
    assert len(logs[1]) == count


# The layer's argument is a list, which full backward hooks do not take.
PAIRS = [(place, kind) for place in PLACES for kind in KINDS if not (place == "layer" and "backward" in kind)]


@pytest.mark.parametrize(("place", "kind"), PAIRS)
def test_hooks_registered_after_apply(place: str, kind: str) -> None:
    naive = without_in_place(dense_net())
    rewritten = rewritten_copy(naive)
    assert_same(train_step(naive, (images(),)), train_step(rewritten, (images(),)))
    hooked_alike(naive, rewritten, place, KINDS[kind], images())
    assert_rewritten(rewritten, 7)


@pytest.mark.parametrize("kind", ["forward", "forward, changing", "pre", "backward, changing"])
@pytest.mark.parametrize("place", ["norm", "convolution", "block", "root"])
def test_hooks_registered_before_apply(place: str, kind: str) -> None:
    naive = without_in_place(dense_net())
    log: Log = []
    KINDS[kind](PLACES[place](naive), log)
    logs: list[Log] = []
    rewritten = rewritten_copy(naive)  # hooks are copied with the model and share its log
    for model in (naive, rewritten):
        log.clear()
        for step in range(2):
            train_step(model, (images(seed=step),), input_gradients=place == "root")
        logs.append(list(log))
    assert_same_logs(*logs)
    assert_rewritten(rewritten)


@pytest.mark.parametrize("place", ["norm", "activation"])
def test_a_hook_inside_a_chain_leaves_it_alone_with_a_reason(place: str) -> None:
    model = rewritten_copy(dense_net())
    PLACES[place](model).register_forward_hook(lambda *_: None)
    train_step(model, (images(),))
    explanation = memopt.explain(model)
    assert "hooks" in reasons(model)
    assert len(explanation.rewritten) >= 5


def test_a_hook_at_the_end_of_a_chain_shortens_it() -> None:
    model = rewritten_copy(dense_net())
    seen: list[torch.Tensor] = []
    PLACES["convolution"](model).register_forward_hook(lambda m, args, out: seen.append(out))
    train_step(model, (images(),))
    assert len(seen) == 1
    assert_rewritten(model, 7)


def test_the_chains_outside_a_hooked_container_are_still_rewritten() -> None:
    model = rewritten_copy(dense_net())
    model.block2.register_forward_hook(lambda *_: None)
    train_step(model, (images(),))
    blocks = {chain.module for chain in memopt.explain(model).rewritten}
    assert {"block1.layers.0.norm1", "block1.layers.2.norm1"} <= blocks


def test_grad_cam() -> None:
    """The commonest use of hooks: features and gradients of a layer, in eval mode."""
    naive = without_in_place(dense_net()).eval()
    maps = []
    for model in (naive, rewritten_copy(naive)):
        seen: dict[str, torch.Tensor] = {}

        def keep(module: nn.Module, args: Any, out: torch.Tensor, seen: dict[str, torch.Tensor] = seen) -> None:
            seen["features"] = out
            out.register_hook(lambda grad: seen.__setitem__("gradient", grad))

        model.block2.register_forward_hook(keep)
        model(images())[:, 2].sum().backward()
        maps.append((seen["features"] * seen["gradient"].mean((2, 3), keepdim=True)).sum(1).relu())
    assert same_bits(*maps)


def test_global_module_hooks() -> None:
    naive = dense_net()
    rewritten = rewritten_copy(naive)
    train_step(rewritten, (images(),))
    naive.load_state_dict(rewritten.state_dict())
    logs: tuple[Log, Log] = ([], [])
    for model, log in zip((naive, rewritten), logs, strict=True):

        def hook(module: nn.Module, args: Any, out: Any, log: Log = log) -> None:
            log.append((type(module).__name__, first(out)))

        handle = global_hooks.register_module_forward_hook(hook)
        try:
            train_step(model, (images(),))
        finally:
            handle.remove()
    assert_same_logs(*logs)
    assert len(logs[0]) > 20


def test_global_backward_hooks() -> None:
    naive = without_in_place(dense_net())
    for block in (naive.block1, naive.block2):  # a list as argument is not for full backward hooks
        block.forward = lambda x, block=block: x * 2
    naive.transition[2] = nn.Conv2d(6, 8, 1)
    naive.transition[0] = nn.BatchNorm2d(6)
    naive.final[0] = nn.BatchNorm2d(8)
    naive.classifier = nn.Linear(8, 5)
    rewritten = rewritten_copy(naive)
    logs: tuple[Log, Log] = ([], [])
    for model, log in zip((naive, rewritten), logs, strict=True):

        def hook(module: nn.Module, grads: Any, out: Any, log: Log = log) -> None:
            log.append((type(module).__name__, first(out)))

        handle = global_hooks.register_module_full_backward_hook(hook)
        try:
            train_step(model, (images(),), input_gradients=True)
        finally:
            handle.remove()
    assert_same_logs(*logs)


def test_hooks_of_parameters() -> None:
    naive = dense_net()
    rewritten = rewritten_copy(naive)
    logs: tuple[Log, Log] = ([], [])
    for model, log in zip((naive, rewritten), logs, strict=True):
        weight = model.block1.layers[0].conv1.weight
        weight.register_hook(lambda grad, log=log: log.append(("weight", grad.clone())) or grad * 2)
        bias = model.block1.layers[1].norm1.bias
        bias.register_post_accumulate_grad_hook(lambda p, log=log: log.append(("bias", p.grad.clone())))
    assert_same(train_step(naive, (images(),)), train_step(rewritten, (images(),)))
    assert_same_logs(sorted(logs[0], key=lambda entry: entry[0]), sorted(logs[1], key=lambda entry: entry[0]))
    assert_rewritten(rewritten, 7)


def test_optimizer_inside_backward() -> None:
    """Each parameter is stepped and its gradient dropped as soon as it is there."""
    naive = dense_net()
    rewritten = rewritten_copy(naive)
    for model in (naive, rewritten):
        for parameter in model.parameters():
            optimizer = torch.optim.SGD([parameter], lr=0.1)

            def step(p: nn.Parameter, optimizer: torch.optim.Optimizer = optimizer) -> None:
                optimizer.step()
                optimizer.zero_grad()

            parameter.register_post_accumulate_grad_hook(step)
    for _ in range(3):
        assert_same(train_step(naive, (images(),)), train_step(rewritten, (images(),)))
    assert_rewritten(rewritten, 7)


def test_a_hook_that_changes_the_shape_of_what_a_module_returns_is_an_error_not_a_wrong_number() -> None:
    model = rewritten_copy(dense_net())
    model.stem.register_forward_hook(lambda m, args, out: out[:, :, 1:-1, 1:-1])
    with pytest.raises(memopt.CaptureError, match="hook on stem returns"):
        model(images())
    memopt.remove(model)
    assert model(images()).shape == (2, 5)


def test_a_hook_that_changes_the_dtype_of_what_a_module_returns() -> None:
    """Without the hook forward fails, so it cannot be recorded: eager's own forward runs."""
    naive = dense_net()
    rewritten = rewritten_copy(naive)
    for model in (naive, rewritten):
        model.stem.register_forward_hook(lambda m, args, out: out.double())
        model.block1.double()
        model.block1.register_forward_hook(lambda m, args, out: out.float())
    expected = train_step(naive, (images(),))
    with pytest.warns(UserWarning, match="memopt left DenseNet as it is"):
        actual = train_step(rewritten, (images(),))
    assert_same(expected, actual)


def test_hooks_are_not_run_by_the_recording() -> None:
    model = rewritten_copy(dense_net())
    calls: list[torch.Tensor] = []
    for place in ("stem", "norm", "block", "root"):
        PLACES[place](model).register_forward_hook(lambda m, args, out: calls.append(out))
    model(images())
    assert len(calls) == 4
    assert all(type(out) is torch.Tensor for out in calls)

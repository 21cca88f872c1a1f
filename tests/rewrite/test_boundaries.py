"""Containers with hooks: called as modules, rewritten inside, counted by `explain`, put back by `remove`."""

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import memopt
from densenet_models import bc
from tests.helpers import (
    DenseLayer,
    assert_exact,
    assert_same,
    assert_trains_alike,
    counted_saves,
    dense_net,
    images,
    plain,
    rewritten_copy,
    train_step,
)


def seen(model: nn.Module, log: list[torch.Tensor]) -> Any:
    return model.register_forward_hook(lambda module, args, output: log.append(output.detach().clone()))


def test_what_is_inside_a_hooked_container_is_rewritten() -> None:
    naive = dense_net()
    model = rewritten_copy(naive)
    log: list[torch.Tensor] = []
    seen(model.block2, log)

    assert_trains_alike(naive, model, images())

    explanation = memopt.explain(model)
    assert len(log) == 2
    # The final norm reads what the container returns: no concat that a recording sees.
    assert [chain.module for chain in explanation.rewritten] == [
        *(f"block1.layers.{n}.norm1" for n in range(3)),
        "transition.0",
        *(f"block2.layers.{n}.norm1" for n in range(2)),
    ]
    assert [chain.block for chain in explanation.rewritten] == [1, 1, 1, 1, 2, 2]
    assert explanation.notes == ()


def test_as_little_is_saved_inside() -> None:
    def saved(model: nn.Module) -> int:
        model(images(4, 12))
        sizes: list[int] = []
        with counted_saves(sizes):
            model(images(4, 12))
        return sum(sizes)

    naive, hooked = dense_net(growth=8), rewritten_copy(dense_net(growth=8))
    hooked.block1.register_forward_hook(lambda *_: None)

    assert saved(hooked) < 0.6 * saved(naive)


def test_hooks_come_and_go() -> None:
    naive, model = dense_net(), rewritten_copy(dense_net())
    log: list[torch.Tensor] = []

    assert_trains_alike(naive, model, images(), steps=1, at_least=7)
    handle = seen(model.block1, log)
    assert_trains_alike(naive, model, images(), steps=2, at_least=6)
    handle.remove()
    assert_trains_alike(naive, model, images(), steps=1, at_least=7)

    assert len(log) == 2


def test_a_container_is_recorded_once() -> None:
    model = rewritten_copy(dense_net())
    model.block1.register_forward_hook(lambda *_: None)
    train_step(model, (images(),))
    rewriter = type(model)._memopt_dispatcher
    latest = rewriter.latest

    train_step(model, (images(),))

    assert rewriter.latest is latest


def test_containers_within_containers() -> None:
    naive, model = dense_net(), rewritten_copy(dense_net())
    log: list[torch.Tensor] = []
    for module in (model.block1, model.block1.layers[1], model.block2):
        seen(module, log)

    assert_trains_alike(naive, model, images())

    modules = [chain.module for chain in memopt.explain(model).rewritten]
    assert modules == [
        "block1.layers.0.norm1",
        "block1.layers.1.norm1",
        "block1.layers.2.norm1",
        "block2.layers.0.norm1",
        "block2.layers.1.norm1",
    ]
    assert len(log) == 6


def test_remove_puts_every_class_back() -> None:
    model = dense_net()
    classes = [type(m) for m in model.modules()]
    memopt.apply(model)
    model.block1.register_forward_hook(lambda *_: None)
    train_step(model, (images(),))

    memopt.remove(model)

    assert [type(m) for m in model.modules()] == classes


def test_pickles_hold_plain_containers() -> None:
    model = memopt.apply(bc.DenseNet(depth=10))
    handle = model.features.denseblock1.register_forward_hook(lambda *_: None)
    train_step(model, (images(),))
    assert type(model.features.denseblock1) is not bc.DenseBlock
    handle.remove()

    loaded = pickle.loads(pickle.dumps(model))

    assert [type(m) for m in loaded.modules()] == [type(m) for m in bc.DenseNet(depth=10).modules()]


def test_copies_have_containers_of_their_own() -> None:
    naive, model = dense_net(), rewritten_copy(dense_net())
    for each in (naive, model):
        each.block1.register_forward_hook(lambda module, args, output: output * 1.5)
        train_step(each, (images(),))

    duplicate = copy.deepcopy(model)

    train_step(model, (images(3),))
    assert_trains_alike(naive, duplicate, images(), at_least=6)


def test_example_inputs_are_verified_through_containers() -> None:
    naive = dense_net()
    naive.block1.register_forward_hook(lambda module, args, output: output * 1.5)

    model = memopt.apply(copy.deepcopy(naive), images())

    assert not memopt.explain(model).ran
    assert_trains_alike(naive, model, images(), at_least=6)


def test_a_model_of_hooked_containers_alone() -> None:
    naive = nn.Sequential(dense_net().stem, dense_net().block1)
    naive[1].register_forward_hook(lambda module, args, output: output * 1.5)

    model = memopt.apply(copy.deepcopy(naive), images())

    assert_trains_alike(naive, model, images(), at_least=3)
    assert memopt.explain(model).notes == ()


@dataclass(frozen=True, slots=True)
class Result:
    """What a block may return."""

    features: torch.Tensor


class Opaque:
    """Another thing that it may return, into which nobody can look."""

    def __init__(self, features: torch.Tensor) -> None:
        self.features = features


WRAPS: dict[str, Callable[[torch.Tensor], Any]] = {
    "dict": lambda f: {"features": f},
    "list": lambda f: [f],
    "dataclass": Result,
    "opaque": Opaque,
}


class Wrapping(nn.Module):
    """A dense block that returns its features inside something."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.inner = dense_net().block1
        self.kind = kind

    def forward(self, x: torch.Tensor) -> Any:
        return WRAPS[self.kind](self.inner(x))


def _wrapping(kind: str) -> nn.Module:
    def body(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        result: Any = self.block(self.stem(x))
        key: Any = {"dict": "features", "list": 0}.get(kind)
        return F.relu(self.norm(result.features if key is None else result[key]))

    model = plain(body, stem=lambda: nn.Conv2d(3, 6, 1), block=lambda: Wrapping(kind), norm=lambda: nn.BatchNorm2d(18))
    model.block.register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize("kind", ["dict", "list", "dataclass"])
def test_a_container_may_return_its_features_inside_another(kind: str) -> None:
    model = memopt.apply(_wrapping(kind), images())

    assert memopt.explain(model).notes == ("block has hooks: it is recorded at its first training forward.",)
    assert_trains_alike(_wrapping(kind), model, images(), at_least=3)
    assert memopt.explain(model).notes == ()


def test_a_container_that_returns_something_else_is_rewritten_within_and_the_reason_told() -> None:
    model = memopt.apply(_wrapping("opaque"))

    with pytest.warns(UserWarning, match="memopt left") as told:
        assert_trains_alike(_wrapping("opaque"), model, images(), at_least=3)
    assert any("block has hooks and returns a Opaque, into which" in str(warning.message) for warning in told)
    assert {chain.module for chain in memopt.explain(model).rewritten} == {
        f"block.inner.layers.{n}.norm1" for n in range(3)
    }


class Branching(nn.Module):
    """Decides by the values of a tensor around a module that does not."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) if bool(x.sum() > -1e9) else self.inner(-x)


@pytest.mark.filterwarnings("ignore:memopt left")
@pytest.mark.parametrize("inputs", [None, images()], ids=["lazily", "now"])
def test_a_container_inside_a_part_of_what_cannot_be_recorded(inputs: torch.Tensor | None) -> None:
    naive = Branching(dense_net())
    naive.inner.block1.register_forward_hook(lambda module, args, output: output * 1.5)

    model = memopt.apply(copy.deepcopy(naive), inputs)

    assert_trains_alike(naive, model, images(), at_least=6)
    explanation = memopt.explain(model)
    modules = [chain.module for chain in explanation.chains]
    assert modules == [
        *(f"inner.block1.layers.{n}.norm1" for n in range(3)),
        *(f"inner.block2.layers.{n}.norm1" for n in range(2)),
        "inner.final.0",
    ]
    assert [chain.block for chain in explanation.chains] == [1, 1, 1, 2, 2, 2]


@pytest.mark.filterwarnings("ignore:memopt left")
def test_a_container_that_cannot_be_recorded_is_rewritten_in_parts() -> None:
    naive = dense_net()
    naive.block1 = Branching(naive.block1)
    naive.block1.register_forward_hook(lambda module, args, output: output * 1.5)
    model = memopt.apply(copy.deepcopy(naive))

    assert_trains_alike(naive, model, images(), at_least=5)
    modules = [chain.module for chain in memopt.explain(model).chains]
    assert modules == [
        *(f"block1.inner.layers.{n}.norm1" for n in range(3)),
        *(f"block2.layers.{n}.norm1" for n in range(2)),
    ]
    memopt.remove(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in naive.modules()]


@pytest.mark.filterwarnings("ignore:memopt left")
def test_levels_go_by_the_paths_of_the_whole_model() -> None:
    model = Branching(dense_net())
    model.inner.block1.register_forward_hook(lambda *_: None)
    levels = {"inner.block1.*": "concat", "inner.block2.layers.1.*": "concat"}
    memopt.apply(model, config=memopt.Config(recompute=levels))

    train_step(model, (images(),))

    assert {chain.module: chain.level for chain in memopt.explain(model).chains} == {
        **{f"inner.block1.layers.{n}.norm1": "concat" for n in range(3)},
        "inner.block2.layers.0.norm1": "layer",
        "inner.block2.layers.1.norm1": "concat",
        "inner.final.0": "layer",
    }


class Overwriting(nn.Module):
    """Changes its inputs, as blocks do that start with an in-place activation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, other: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        other.mul_(2.0)
        return self.conv(F.relu(x, inplace=True))


@pytest.mark.parametrize("hooked", [True, False])
def test_a_container_that_overwrites_a_feature(hooked: bool) -> None:
    def body(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        features = [self.stem(x)]
        features.append(self.layer([*features]))
        other = torch.zeros(1).to(x)
        features.append(self.conv(F.relu(self.norm(torch.cat(features, 1)))))
        return torch.cat([*features, self.overwriting(other, features[1])], 1)

    model = plain(
        body,
        stem=lambda: nn.Conv2d(3, 4, 3, padding=1),
        layer=lambda: DenseLayer(4, 4),
        norm=lambda: nn.BatchNorm2d(8),
        conv=lambda: nn.Conv2d(8, 4, 3, padding=1),
        overwriting=Overwriting,
    )
    if hooked:
        model.overwriting.register_forward_hook(lambda *_: None)
    assert_exact(model, images(), at_least=0)


def test_grad_cam_on_a_block_and_inside_it() -> None:
    """Maps are eager's; the hook inside a block costs that chain alone."""
    naive = dense_net().eval()
    for module in naive.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    maps: list[list[torch.Tensor]] = []
    for model in (naive, rewritten_copy(naive)):
        kept: list[torch.Tensor] = []
        for module in (model.block1, model.block2.layers[1].relu1):
            module.register_forward_hook(lambda m, args, output, kept=kept: kept.append(output))
        score = model(images())[:, 2].sum()
        maps.append(list(torch.autograd.grad(score, kept)))
    assert_same(*({str(i): g for i, g in enumerate(each)} for each in maps))
    chains = {chain.module: chain for chain in memopt.explain(model).rewritten}
    assert [name for name in chains if name.startswith("block1")] == [f"block1.layers.{n}.norm1" for n in range(3)]
    assert chains["block2.layers.0.norm1"].role == "layer"
    assert chains["block2.layers.1.norm1"].role == "exit"  # the chain ends before the hooked activation

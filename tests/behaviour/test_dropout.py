"""Dropout draws what eager draws, and train/eval is never frozen at capture."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers import (
    LEVELS,
    DenseNet,
    assert_exact,
    assert_rewritten,
    assert_same,
    assert_trains_alike,
    dense_net,
    images,
    rewritten_copy,
    train_step,
)


class LayerWithDropout(nn.Module):
    def __init__(self, layer: nn.Module, drop: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.layer = layer
        self.drop = drop
        self.rate = 0.4
        self.module = nn.Dropout(0.3)

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        return self.drop(self, self.layer(features))


def with_dropout(drop: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> DenseNet:
    model = dense_net()
    for block in (model.block1, model.block2):
        block.layers = nn.ModuleList(LayerWithDropout(layer, drop) for layer in block.layers)
    return model


def functional(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return F.dropout(x, p=self.rate, training=self.training)


def as_module(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return self.module(x)


FORMS = {
    "module": as_module,
    "functional": functional,
    "positional": lambda self, x: F.dropout(x, self.rate, self.training),
    "always on": lambda self, x: F.dropout(x, 0.5),
    "in place": lambda self, x: F.dropout(x, self.rate, self.training, True),
    "dropout2d": lambda self, x: F.dropout2d(x, self.rate, self.training),
    "torch.dropout": lambda self, x: torch.dropout(x, self.rate, self.training),
    "alpha": lambda self, x: F.alpha_dropout(x, self.rate, self.training),
    "only if positive": lambda self, x: functional(self, x) if self.rate > 0 else x,
}


@pytest.mark.parametrize("form", FORMS)
def test_same_random_numbers_as_eager(form: str) -> None:
    assert_exact(with_dropout(FORMS[form]), images())


@pytest.mark.parametrize("form", ["module", "functional", "dropout2d"])
def test_dropout_in_eval_mode(form: str) -> None:
    assert_exact(with_dropout(FORMS[form]).eval(), images())


@pytest.mark.parametrize("make", [nn.Dropout, nn.Dropout2d, lambda p: nn.Dropout(p, inplace=True)])
@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_dropout_modules(make: Callable[[float], nn.Module], p: float) -> None:
    model = with_dropout(as_module)
    for layer in (*model.block1.layers, *model.block2.layers):
        layer.module = make(p)
    assert_exact(model, images())


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_functional_dropout_at_its_ends(p: float) -> None:
    model = with_dropout(functional)
    for layer in model.block1.layers:
        layer.rate = p
    assert_exact(model, images())


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("form", ["module", "functional"])
def test_train_and_eval_after_apply(form: str, level: str) -> None:
    naive = with_dropout(FORMS[form])
    rewritten = rewritten_copy(naive, level)
    for training in (True, False, True, False):
        for model in (naive, rewritten):
            model.train(training)
        assert_trains_alike(naive, rewritten, images(), steps=1)


def test_one_layer_switched_to_eval_after_apply() -> None:
    naive = with_dropout(as_module)
    rewritten = rewritten_copy(naive)
    for training in (True, False):
        for model in (naive, rewritten):
            model.block1.layers[1].module.train(training)
        assert_trains_alike(naive, rewritten, images(), steps=1)


@pytest.mark.parametrize("form", ["module", "functional", "only if positive"])
def test_rate_changed_after_apply(form: str) -> None:
    naive = with_dropout(FORMS[form])
    rewritten = rewritten_copy(naive)
    for rate in (0.4, 0.9, 0.0):
        for model in (naive, rewritten):
            for layer in model.block1.layers:
                layer.rate = layer.module.p = rate
        assert_trains_alike(naive, rewritten, images(), steps=1)


def test_two_forwards_before_one_backward_keep_their_own_masks() -> None:
    naive = with_dropout(as_module)
    rewritten = rewritten_copy(naive)
    observed = []
    for model in (naive, rewritten):
        torch.manual_seed(3)
        first, second = model(images(seed=1)), model(images(seed=2))
        (first.square().sum() - second.square().sum()).backward()
        observed.append({name: p.grad for name, p in model.named_parameters()})
    assert_same(*observed)
    assert_rewritten(rewritten)


def test_recording_draws_no_random_numbers() -> None:
    model = with_dropout(as_module)
    fresh = copy.deepcopy(model)
    rewritten = rewritten_copy(model)
    first = train_step(rewritten, (images(),))  # records
    assert_same(train_step(fresh, (images(),)), first)

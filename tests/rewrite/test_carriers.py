"""Inputs that carry metadata run rewritten and hand it on; other classes of tensors are left alone, which is told."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import memopt
from tests.helpers import assert_same, dense_net, images, rewritten_copy, state_of

meta_tensor = pytest.importorskip("monai.data.meta_tensor", reason="MONAI is not installed")


def carrier(seed: int = 1) -> Any:
    return meta_tensor.MetaTensor(images(seed=seed), meta={"filename": "a.nii", "seed": seed})


def step(model: nn.Module, x: Any) -> tuple[Any, dict[str, torch.Tensor | None]]:
    model.zero_grad()
    result = model(x)
    result.square().sum().backward()
    return result, state_of(model)


def test_a_metatensor_runs_rewritten_and_its_metadata_arrives() -> None:
    naive = dense_net()
    model = rewritten_copy(naive)
    for seed in (1, 2):
        (expected, before), (actual, after) = (step(each, carrier(seed)) for each in (naive, model))
        assert type(actual) is type(expected) is meta_tensor.MetaTensor
        assert actual.meta.keys() == expected.meta.keys()
        assert (actual.meta["filename"], actual.meta["seed"]) == ("a.nii", seed)
        assert torch.equal(expected.as_tensor(), actual.as_tensor())
        assert_same(before, after)
    assert len(memopt.explain(model).rewritten) == 7
    assert type(model(images())) is torch.Tensor, "recorded once for both"


def test_gradients_of_such_an_input_arrive() -> None:
    naive = dense_net()
    gradients = []
    for model in (naive, rewritten_copy(naive)):
        x = carrier().requires_grad_()
        (gradient,) = torch.autograd.grad(model(x).square().sum(), x)
        gradients.append(gradient.as_subclass(torch.Tensor))
    assert torch.equal(*gradients)


def test_example_inputs_may_carry_metadata() -> None:
    model = memopt.apply(dense_net(), carrier())
    assert len(memopt.explain(model).rewritten) == 7


class Own(torch.Tensor):
    """A class of the user's."""


def test_another_class_of_tensors_is_left_alone_and_told() -> None:
    naive = dense_net()
    model = memopt.apply(copy.deepcopy(naive))
    with pytest.warns(UserWarning, match=r"its input is a Own.*Hand in x\.as_subclass\(torch\.Tensor\)"):
        _, after = step(model, images().as_subclass(Own))
    _, before = step(naive, images().as_subclass(Own))
    assert_same(before, after)
    assert "its input is a Own" in memopt.explain(model).notes[0]

    step(model, images())
    assert len(memopt.explain(model).rewritten) == 7

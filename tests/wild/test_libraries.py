"""Networks from torchvision, timm and MONAI: every chain rewritten, every bit and everything about the object kept."""

import copy
import functools

import pytest
import torch
from torch import nn

import memopt
from memopt.capture import through_checkpoints
from tests.helpers import assert_everything_stays, assert_same, train_step
from tests.wild.libraries import DENSE, LOOK_ALIKES

CHECKPOINTED = [name for name in DENSE if "memory_efficient" in name]


@functools.cache
def _made(name: str) -> nn.Module:
    torch.manual_seed(0)
    make = DENSE[name][0] if name in DENSE else LOOK_ALIKES[name][0]
    return make()


def _image(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", DENSE)
def test_a_dense_net_trains_to_the_bit_with_every_chain_rewritten(name: str) -> None:
    _, shape, chains = DENSE[name]
    naive = copy.deepcopy(_made(name))
    rewritten = memopt.apply(copy.deepcopy(naive))
    for batch in (_image(shape), _image((3, *shape[1:]))):
        with through_checkpoints():  # which update running statistics twice
            expected = train_step(naive, (batch,))
        assert_same(expected, train_step(rewritten, (batch,)))

    explanation = memopt.explain(rewritten)
    assert explanation.ran
    assert len(explanation.rewritten) == len(explanation.chains) >= chains, str(explanation)


@pytest.mark.parametrize("name", ["torchvision DenseNet", "timm DenseNet, BatchNormAct2d", *CHECKPOINTED])
def test_a_dense_net_is_verified_on_apply(name: str) -> None:
    _, shape, _ = DENSE[name]
    model = memopt.apply(copy.deepcopy(_made(name)), example_inputs=_image(shape))

    assert memopt.explain(model).rewritten
    assert not any("Not verified" in note for note in memopt.explain(model).notes)


@pytest.mark.parametrize("name", DENSE)
def test_everything_about_the_object_stays(name: str) -> None:
    assert_everything_stays(copy.deepcopy(_made(name)), _image(DENSE[name][1]))


@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_look_alikes_of_the_libraries_are_left_alone(name: str) -> None:
    naive = copy.deepcopy(_made(name))
    rewritten = memopt.apply(copy.deepcopy(naive))
    batch = _image(LOOK_ALIKES[name][1])

    assert_same(train_step(naive, (batch,)), train_step(rewritten, (batch,)))
    assert not memopt.explain(rewritten).rewritten

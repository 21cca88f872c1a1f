"""On a GPU: 200 steps of DenseNet-BC-40 on real images end within noise of eager's, over 5 seeds."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

import memopt
from densenet_models import bc
from tests.digits import Change, differs_beyond_noise, roughly, train_digits

pytestmark = pytest.mark.gpu

STEPS = 200


@pytest.fixture
def _repeatable() -> Iterator[None]:
    """What cuDNN does: the same bits at every run, so that this test says the same at every run."""
    with torch.backends.cudnn.flags(enabled=True, deterministic=True):
        yield


def make() -> nn.Module:
    return bc.DenseNet(depth=40)


def fast(model: nn.Module) -> nn.Module:
    return memopt.apply(model, config=memopt.Config(numerics="fast"))


def losses(change: Change) -> list[float]:
    """On the training images in evaluation mode, of each seed."""
    device = torch.device("cuda", torch.cuda.current_device())
    return [
        train_digits(make, change, seed, steps=STEPS, epochs=9, device=device, batch_size=64).train.loss
        for seed in range(5)
    ]


@pytest.mark.usefixtures("_repeatable")
def test_fast_trains_as_eager_does() -> None:
    plain, rough, fused = losses(lambda model: model), losses(roughly), losses(fast)
    print(f"eager {plain}\neager from rounded weights {rough}\nfast {fused}")
    assert max(plain) < 1.0, "eager has learned too little for a comparison"
    assert differs_beyond_noise(plain, rough, fused) is None

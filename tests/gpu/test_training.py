"""On a GPU: 200 steps of DenseNet-BC-40 on real images end within noise of eager's, over 5 seeds."""

import itertools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from memopt_cli.main import main
from memopt_cli.train import digits
from memopt_cli.train.batches import Batches, Share
from torch import nn

import memopt
from densenet_models import bc
from densenet_models.train import Recipe, Trainer
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


def test_the_loop_and_its_loader_never_wait_for_the_device() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    trainer = Trainer(fast(bc.DenseNet(depth=22).to(device)), Recipe())
    data = digits.load()
    batches = Batches(data, 64, Share(), seed=0, augment=True, device=device).training(data.train, 0)
    trainer.train(itertools.islice(batches, 3), lambda done: None, lambda: False)
    with waiting_is_an_error():
        trainer.train(itertools.islice(batches, 3), lambda done: None, lambda: False)


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype", UserWarning)
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("naive", ["--naive", "--efficient"])
def test_the_command_uses_the_gpu(
    naive: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--depth", "22", "--epochs", "2", naive, "--amp", "bf16", "--batch-size", "auto"]) == 0
    out = capsys.readouterr().out
    assert torch.cuda.get_device_name() in out
    assert "peak allocated" in out
    assert (tmp_path / "runs" / "1" / "best.pt").exists()


@pytest.mark.usefixtures("_repeatable")
def test_fast_trains_as_eager_does() -> None:
    plain, rough, fused = losses(lambda model: model), losses(roughly), losses(fast)
    print(f"eager {plain}\neager from rounded weights {rough}\nfast {fused}")
    assert max(plain) < 1.0, "eager has learned too little for a comparison"
    assert differs_beyond_noise(plain, rough, fused) is None

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from memopt_cli.errors import CommandError
from memopt_cli.train import run_folder
from memopt_cli.train.run_folder import RunFolder, next_free, write_whole
from torch import nn
from torch.distributed.checkpoint import filesystem

from densenet_models.train import Recipe, Trainer, fit

NOTES = [{"seconds": 1.0, "peak_bytes": 5}, {"seconds": 1.0, "peak_bytes": 6}]


def trainer(width: int = 4, epochs: int = 2) -> Trainer:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 2))
    return Trainer(model, Recipe(epochs=epochs))


def trained(epochs: int = 2, **options: int) -> Trainer:
    made = trainer(epochs=epochs, **options)
    batch = torch.randn(8, 3), torch.randint(0, 2, (8,))
    fit(made, lambda epoch, first: [batch], lambda: [batch])
    return made


def state_of(trainer: Trainer) -> list[torch.Tensor]:
    momentum = [s["momentum_buffer"] for s in trainer.optimizer.state_dict()["state"].values()]
    return [*trainer.model.state_dict().values(), *momentum]


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder(tmp_path / "run")
    made.begin({"depth": 10})
    return made


def test_a_state_comes_back_as_it_was(folder: RunFolder) -> None:
    first, second = trained(), trainer()
    folder.save_state(first, NOTES)
    assert folder.load_state(second) == NOTES
    assert all(torch.equal(a, b) for a, b in zip(state_of(first), state_of(second), strict=True))
    assert second.progress() == first.progress()
    assert second.history == first.history


def test_only_the_latest_state_is_kept(folder: RunFolder) -> None:
    folder.save_state(trained(epochs=1), NOTES[:1])
    folder.save_state(trained(epochs=2), NOTES)
    assert [path.name for path in folder.path.glob("state*")] == ["state-00002-000000"]


def test_without_a_state_training_begins(folder: RunFolder) -> None:
    made = trainer()
    assert folder.load_state(made) == []
    assert (made.epoch, made.batch) == (0, 0)


def test_the_best_weights_are_a_plain_state_dict(folder: RunFolder) -> None:
    made = trained()
    folder.save_best(made)
    loaded = torch.load(folder.best, weights_only=True)
    plain = trainer().model
    plain.load_state_dict(loaded)
    assert all(torch.equal(a, b) for a, b in zip(made.model.state_dict().values(), loaded.values(), strict=True))


def test_a_folder_with_a_run_is_not_begun_again(folder: RunFolder) -> None:
    with pytest.raises(CommandError, match=r"holds a run already\. Go on with it by --resume"):
        folder.begin({})
    assert folder.settings() == {"depth": 10}


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="holds no run to resume"):
        RunFolder(tmp_path).settings()


def test_damaged_settings_are_a_line(folder: RunFolder) -> None:
    (folder.path / "settings.json").write_text('{"depth": 1')
    with pytest.raises(CommandError, match=r"settings.json is damaged .* Restore it"):
        folder.settings()


def test_a_folder_that_cannot_be_made_is_a_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CommandError, match=r"cannot be written: .* choose another folder"):
        RunFolder(tmp_path / "file" / "run").begin({})


def test_the_state_of_another_model_is_a_line(folder: RunFolder) -> None:
    folder.save_state(trained(), NOTES)
    other = trainer(width=5)
    before = [tensor.clone() for tensor in other.model.state_dict().values()]
    with pytest.raises(CommandError, match=r"damaged or of another model .* Begin a new run") as error:
        folder.load_state(other)
    assert "\n" not in str(error.value)
    assert all(torch.equal(a, b) for a, b in zip(before, other.model.state_dict().values(), strict=True))


@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp"])
def test_a_truncated_state_is_a_line(folder: RunFolder, file: str) -> None:
    folder.save_state(trained(), NOTES)
    (damaged,) = folder.path.glob(f"state*/{file}")
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(CommandError, match=r"damaged or of another model .* Begin a new run") as error:
        folder.load_state(trainer())
    assert "\n" not in str(error.value)


class FullDisk:
    """A file system on which only some bytes more can be written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_full = False

        def fsync(descriptor: int) -> None:
            if self.is_full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(filesystem.os, "fsync", fsync)


def test_no_space_left_leaves_the_last_good_state(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = FullDisk(monkeypatch)
    good = trained(epochs=1)
    folder.save_state(good, NOTES[:1])
    folder.save_best(good)
    best = folder.best.read_bytes()
    before = sorted(path.name for path in folder.path.iterdir())
    disk.is_full = True
    later = trained(epochs=2)
    for save in (lambda: folder.save_state(later, NOTES), lambda: folder.save_best(later)):
        with pytest.raises(CommandError, match="cannot be written: No space left on device") as error:
            save()
        assert "\n" not in str(error.value)
    assert sorted(path.name for path in folder.path.iterdir()) == before
    assert folder.best.read_bytes() == best
    resumed = trainer()
    assert folder.load_state(resumed) == NOTES[:1]
    assert all(torch.equal(a, b) for a, b in zip(state_of(good), state_of(resumed), strict=True))


def test_being_killed_while_saving_leaves_the_last_good_state(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = trained(epochs=1)
    folder.save_state(good, NOTES[:1])

    def killed(source: Any, target: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run_folder.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        folder.save_state(trained(epochs=2), NOTES)
    monkeypatch.undo()
    assert folder.load_state(trainer()) == NOTES[:1]
    folder.save_state(trained(epochs=2), NOTES)
    assert sorted(path.name for path in folder.path.glob("state*")) == ["state-00002-000000"]


def test_the_log_is_a_line_an_epoch(folder: RunFolder) -> None:
    made = trained()
    folder.write_log(made.history, NOTES)
    head, *lines = (folder.path / "log.csv").read_text().splitlines()
    assert head == "epoch,learning_rate,train_loss,train_error,valid_loss,valid_error,seconds,peak_bytes"
    assert [line.split(",")[0] for line in lines] == ["1", "2"]
    assert float(lines[1].split(",")[2]) == made.history[1].train.loss


def test_next_free_folder(tmp_path: Path) -> None:
    assert next_free(tmp_path / "runs") == tmp_path / "runs" / "1"
    (tmp_path / "1").mkdir()
    assert next_free(tmp_path) == tmp_path / "2"


def test_writing_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x"
    write_whole(file, b"old")
    FullDisk(monkeypatch).is_full = True
    with pytest.raises(OSError, match="No space left"):
        write_whole(file, b"new")
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]

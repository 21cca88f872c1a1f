"""The folder of a run. What lies there under its name is whole: it is written elsewhere first and then renamed.

| name | what |
|---|---|
| `best.pt` | the state_dict with the smallest validation error so far; the plain model loads it |
| `state-EPOCH-BATCH/` | the latest state to go on from (torch.distributed.checkpoint: for any number of processes) |
| `settings.json` | the options of the run |
| `log.csv` | a line an epoch |
| `curves.svg`, `curves.png` | loss and error over the epochs |
"""

import csv
import io
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from densenet_models.train import EpochResult, Progress, Trainer, take_buffers_of_first_rank

from ..errors import CommandError
from .group import on_first_rank

_STATE = re.compile(r"state-(\d+)-(\d+)$")
_UNFINISHED = "state.tmp"

Notes = list[dict[str, Any]]
"""Of each epoch, what the command knows beside the loop: seconds, peak memory."""


class RunFolder:
    """Where a run keeps its results.

    Args:
        path: of the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def best(self) -> Path:
        """File of the best weights."""
        return self.path / "best.pt"

    def begin(self, settings: dict[str, Any]) -> None:
        """Make the folder and note the options.

        Raises:
            CommandError: it holds a run already, or cannot be written.
        """
        if (self.path / "settings.json").exists():
            raise CommandError(
                f"{self.path} holds a run already. Go on with it by --resume, or save in another folder."
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(self.path, error) from error
        self.write("settings.json", (json.dumps(settings, indent=2) + "\n").encode())

    def settings(self) -> dict[str, Any]:
        """The options that the run was begun with.

        Raises:
            CommandError: there is no run.
        """
        file = self.path / "settings.json"
        if not file.is_file():
            raise CommandError(f"{self.path} holds no run to resume. Name the folder of one, or begin one with --save.")
        try:
            stored: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CommandError(f"{file} is damaged ({error}). Restore it, or begin a new run.") from error
        return stored

    def write(self, name: str, content: bytes) -> None:
        """Write a file of the folder, whole or not at all.

        Raises:
            CommandError: it cannot be written; what was there before is there still.
        """
        try:
            write_whole(self.path / name, content)
        except OSError as error:
            raise _unwritable(self.path / name, error) from error

    def write_log(self, history: Sequence[EpochResult], notes: Notes) -> None:
        """Write `log.csv`: what the loop reports of each epoch and what the command noted beside it."""
        rows = [{**_flat(result), **note} for result, note in zip(history, notes, strict=True)]
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        self.write("log.csv", text.getvalue().encode())

    def save_best(self, trainer: Trainer) -> None:
        """Keep the present weights as the best. A collective call in a process group."""
        weights = get_model_state_dict(
            trainer.model, options=StateDictOptions(full_state_dict=dist.is_initialized(), cpu_offload=True)
        )
        content = io.BytesIO()
        torch.save(weights, content)
        on_first_rank(lambda: self.write(self.best.name, content.getvalue()))

    def save_state(self, trainer: Trainer, notes: Notes) -> None:
        """Keep everything that training needs to go on; older states go. A collective call in a process group.

        Raises:
            CommandError: it cannot be written; the state before is there still.
        """
        take_buffers_of_first_rank(trainer.model)
        progress = trainer.progress()
        final = self.path / f"state-{progress.epoch:05d}-{progress.batch:06d}"
        if final.exists():
            return
        unfinished = self.path / _UNFINISHED
        on_first_rank(lambda: shutil.rmtree(unfinished, ignore_errors=True))
        content = {**_tensors(trainer), "progress": _as_json(progress, notes), "scaler": trainer.scaler.state_dict()}
        try:
            with _one_process_will_do():
                save(content, checkpoint_id=unfinished)
        except CheckpointException as error:
            on_first_rank(lambda: shutil.rmtree(unfinished, ignore_errors=True))
            raise _unwritable(final, next(iter(error.failures.values()))[0]) from error
        on_first_rank(lambda: self._replace_state(unfinished, final))

    def load_state(self, trainer: Trainer) -> Notes:
        """Put a trainer where the latest state was taken, if there is one. A collective call in a process group.

        Returns:
            The notes that were saved with it.

        Raises:
            CommandError: the state is damaged or of another model.
        """
        latest = self._latest()
        if latest is None:
            return []
        content = {**_tensors(trainer), "progress": "", "scaler": trainer.scaler.state_dict()}
        try:
            with _one_process_will_do():
                load(content, checkpoint_id=latest)
        except (CheckpointException, RuntimeError, ValueError, KeyError, OSError) as error:
            raise CommandError(
                f"{latest} is damaged or of another model ({_first_reason(error)}). Begin a new run, or resume with "
                "the model that it was trained with."
            ) from error
        set_state_dict(
            trainer.model,
            trainer.optimizer,
            model_state_dict=content["model"],
            optim_state_dict=content["optimizer"],
        )
        trainer.scaler.load_state_dict(content["scaler"])
        progress, notes = _from_json(content["progress"])
        trainer.go_on_from(progress)
        return notes

    def _states(self) -> list[Path]:
        return sorted(path for path in self.path.iterdir() if _STATE.match(path.name))

    def _latest(self) -> Path | None:
        states = self._states()
        return states[-1] if states else None

    def _replace_state(self, unfinished: Path, final: Path) -> None:
        older = self._states()
        try:
            os.replace(unfinished, final)
            sync_folder(self.path)
        except OSError as error:
            raise _unwritable(final, error) from error
        for state in older:
            shutil.rmtree(state, ignore_errors=True)


def next_free(parent: Path) -> Path:
    """The first of parent/1, parent/2, … that does not exist."""
    number = 1
    while (parent / str(number)).exists():
        number += 1
    return parent / str(number)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or whoever looks after a crash, sees the old content or the new.

    Raises:
        OSError: it cannot be written; the old content is there still.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make renames in a folder last through a power failure, where the system lets folders be opened."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _one_process_will_do() -> Iterator[None]:
    """Without a process group torch warns that it assumes one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _tensors(trainer: Trainer) -> dict[str, Any]:
    model, optimizer = get_state_dict(trainer.model, trainer.optimizer)
    return {"model": model, "optimizer": optimizer}


def _as_json(progress: Progress, notes: Notes) -> str:
    return json.dumps({"progress": asdict(progress), "notes": notes})


def _from_json(text: str) -> tuple[Progress, Notes]:
    values = json.loads(text)
    progress = values["progress"]
    progress["history"] = [EpochResult.from_dict(result) for result in progress["history"]]
    return Progress(**progress), values["notes"]


def _flat(result: EpochResult) -> dict[str, Any]:
    return {
        "epoch": result.epoch,
        "learning_rate": result.learning_rate,
        "train_loss": result.train.loss,
        "train_error": result.train.error,
        "valid_loss": result.valid.loss,
        "valid_error": result.valid.error,
    }


def _unwritable(path: Path, error: BaseException) -> CommandError:
    reason = getattr(error, "strerror", None) or _first_reason(error)
    return CommandError(
        f"{path} cannot be written: {reason}. What was saved before it is intact; make room or choose another folder."
    )


def _first_reason(error: BaseException) -> str:
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

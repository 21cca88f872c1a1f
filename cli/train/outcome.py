"""What is printed of a run: what it is, a line an epoch, and curves at the end."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from densenet_models.train import EpochResult
from memopt.ir import whole_mebibytes
from memopt.report import Curve, draw_curves

from .prepare import Run
from .run_folder import RunFolder


def introduce(run: Run, say: Callable[[str], object]) -> None:
    """Say what will be trained, where, on what, and where results go."""
    parameters = sum(parameter.numel() for parameter in run.trainer.model.parameters())
    device, ranks = run.batches.device, run.batches.share.ranks
    where = "the CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
    processes = f" in {ranks} processes" if ranks > 1 else ""
    tests = 0 if run.data.test is None else len(run.data.test)
    say(f"{run.network.name}, {parameters:,} parameters, on {where}{processes}")
    say(
        f"{run.data.name}: {len(run.train):,} to train on, {len(run.valid):,} to validate, {tests:,} to test; "
        f"batches of {run.settings.batch_size}"
    )
    epochs = run.settings.epochs
    if run.trainer.epoch >= epochs:
        again = f"memopt train --resume {run.folder.path} --epochs N"
        say(f"this run is finished: all {epochs} epochs are done. Go on with: {again}, N above {epochs}")
    elif run.trainer.epoch or run.trainer.batch:
        say(f"going on from epoch {run.trainer.epoch + 1}, batch {run.trainer.batch + 1}")
    say(f"results in {run.folder.path}")


def epoch_line(result: EpochResult, epochs: int, note: dict[str, Any], memory: str) -> str:
    """An epoch on one line.

    Args:
        result: of the epoch.
        epochs: how many there will be.
        note: its seconds and peak memory.
        memory: what kind of peak that is.
    """
    return (
        f"epoch {result.epoch:>{len(str(epochs))}}/{epochs}  lr {result.learning_rate:<6g} "
        f"train loss {result.train.loss:.4f} error {100 * result.train.error:5.2f} %  "
        f"valid loss {result.valid.loss:.4f} error {100 * result.valid.error:5.2f} %  "
        f"{note['seconds']:.1f} s  {memory} {whole_mebibytes(note['peak_bytes'])}"
    )


def draw(folder: RunFolder, name: str, history: Sequence[EpochResult], say: Callable[[str], object]) -> None:
    """Write the curves of loss and error into the run's folder, where matplotlib is installed."""
    curves = (
        Curve("cross-entropy", [r.train.loss for r in history], [r.valid.loss for r in history]),
        Curve("error (%)", [100 * r.train.error for r in history], [100 * r.valid.error for r in history]),
    )
    try:
        for file_format in ("svg", "png"):
            folder.write(f"curves.{file_format}", draw_curves(curves, name, file_format))
    except ImportError:
        say("no curves drawn: matplotlib is not installed (pip install matplotlib)")
        return
    say(f"curves in {folder.path / 'curves.svg'} and curves.png")

"""`memopt train`, from its options to its exit status."""

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

import memopt
from densenet_models.train import Batch, DivergedError, EpochResult, Score, evaluate, fit
from memopt.report import training_display

from ..errors import CommandError
from .group import on_first_rank, process_group
from .interruption import Interruption
from .memory import HighWater
from .outcome import draw, epoch_line, introduce
from .prepare import Run, make_machine, prepare, this_device

Say = Callable[[str], object]


def train(options: argparse.Namespace) -> int:
    """Train as the options say.

    Returns:
        0 done, 130 or 143 stopped by a signal after saving.

    Raises:
        CommandError: an option, the data or the folder cannot be used.
    """
    device = this_device(options)
    with process_group(device, options.timeout) as share, Interruption() as interruption:
        machine = make_machine(options, device, share)
        aloud = share.rank == 0 and not options.quiet
        say: Say = _print if aloud else lambda line: None
        run = prepare(options, machine)
        introduce(run, say)
        if not _Fitting(run, say).fit(interruption.requested, quiet=not aloud):
            return _leave(run, interruption, say)
        _conclude(run, say)
    return 0


def _print(line: str) -> None:
    print(line, flush=True)


class _Fitting:
    """The loop's callbacks, and what they must remember between calls."""

    def __init__(self, run: Run, say: Say) -> None:
        self._run = run
        self._say = say
        self._high_water = HighWater(run.batches.device)
        self._begun = time.perf_counter()
        self._loading_seconds = 0.0
        self._explained = False

    def fit(self, should_stop: Callable[[], bool], *, quiet: bool) -> bool:
        """Train to the end; False if stopped."""
        run = self._run
        total = run.batches.per_epoch(run.train)
        with training_display(sys.stderr, epochs=run.settings.epochs, quiet=quiet) as show:

            def on_step(done: int) -> None:
                show(run.trainer.epoch, done, total)
                self._explain()

            try:
                return fit(
                    run.trainer,
                    lambda epoch, first: self._timed(run.batches.training(run.train, epoch, first)),
                    lambda: run.batches.evaluation(run.valid),
                    on_step=on_step,
                    on_epoch=self._finish_epoch,
                    should_stop=should_stop,
                )
            except DivergedError as error:
                raise CommandError(
                    f"Training diverged: {error}. Begin a new run with a smaller --lr than {run.settings.lr:g}."
                ) from error

    def _timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        iterator = iter(batches)
        while True:
            start = time.perf_counter()
            batch = next(iterator, None)
            self._loading_seconds += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def _explain(self) -> None:
        if self._explained:
            return
        self._explained = True
        explanation = memopt.explain(self._run.trainer.model)
        if explanation.applied:
            self._say(f"memopt rewrote {len(explanation.rewritten)} of {len(explanation.chains)} chains")
            for note in explanation.notes:
                self._say(f"  {note}")

    def _finish_epoch(self, result: EpochResult) -> None:
        run = self._run
        note = self._note()
        run.notes.append(note)
        if _is_best(run.trainer.history):
            run.folder.save_best(run.trainer)
        run.folder.save_state(run.trainer, run.notes)
        on_first_rank(lambda: run.folder.write_log(run.trainer.history, run.notes))
        self._say(epoch_line(result, run.settings.epochs, note, self._high_water.kind))

    def _note(self) -> dict[str, Any]:
        now = time.perf_counter()
        note = {
            "seconds": round(now - self._begun, 3),
            "loading_seconds": round(self._loading_seconds, 3),
            "peak_bytes": self._high_water.peak_bytes(),
        }
        self._begun, self._loading_seconds = now, 0.0
        return note


def _is_best(history: list[EpochResult]) -> bool:
    """Whether the last epoch is better than all before it."""
    *before, last = history
    return all(_merit(last) < _merit(other) for other in before)


def _merit(result: EpochResult) -> tuple[float, float]:
    return result.valid.error, result.valid.loss


def _leave(run: Run, interruption: Interruption, say: Say) -> int:
    run.folder.save_state(run.trainer, run.notes)
    say(f"Interrupted, and saved. Go on with: memopt train --resume {run.folder.path}")
    return interruption.status


def _conclude(run: Run, say: Say) -> None:
    best = min(run.trainer.history, key=_merit)
    say(f"best epoch {best.epoch}: validation error {100 * best.valid.error:.2f} %")
    if run.data.test is not None:
        score = _test(run)
        say(f"test error {100 * score.error:.2f} %, loss {score.loss:.4f}, with the weights in {run.folder.best}")
    on_first_rank(lambda: draw(run.folder, run.network.name, run.trainer.history, say))


def _test(run: Run) -> Score:
    """Score of the best weights, loaded by the plain model, on the test images."""
    assert run.data.test is not None
    model = run.network.make()
    model.load_state_dict(torch.load(run.folder.best, map_location="cpu", weights_only=True))
    return evaluate(model.to(run.batches.device), run.batches.evaluation(run.data.test), run.settings.recipe.amp)

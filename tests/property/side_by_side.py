"""Two copies of a generated model, one rewritten, trained from the same state of everything that forward may read."""

import copy
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch

import memopt
from memopt.measure.bits import same_bits
from tests.helpers import train_step
from tests.property import models
from tests.property.models import Recipe

REPEATS = 20
"""Runs of eager after which it is taken to repeat itself."""


def differences(recipe: Recipe, steps: int = 3) -> tuple[list[str], memopt.Explanation]:
    """What differs between eager and rewritten training over some steps, and what memopt did.

    Nothing can be said where eager differs from itself: some CPU kernels for bfloat16 choose by how memory is aligned.
    `eager_repeats_itself` tells.
    """
    torch.manual_seed(0)
    start = recipe.make()
    batches = [recipe.inputs(recipe.batch), recipe.inputs(recipe.batch + 1), recipe.inputs(recipe.batch)]
    eager = _trained(start, batches[:steps], recipe, None)
    rewritten = _trained(start, batches[:steps], recipe, memopt.Config(recompute=recipe.level))
    return _differing(eager, rewritten), memopt.explain(rewritten[2])


def eager_repeats_itself(recipe: Recipe, steps: int = 3) -> bool:
    """Whether eager makes the same bits again, its tensors lying elsewhere in memory each time."""
    torch.manual_seed(0)
    start = recipe.make()
    batches = [recipe.inputs(recipe.batch), recipe.inputs(recipe.batch + 1), recipe.inputs(recipe.batch)]
    first = _trained(start, batches[:steps], recipe, None)
    generator, kept = random.Random(0), []
    for _ in range(REPEATS):
        gaps = [torch.empty(generator.randrange(1, 9000)) for _ in range(generator.randrange(1, 200))]
        kept.append(gaps[::2])
        if _differing(first, _trained(start, batches[:steps], recipe, None)):
            return False
    return True


def _differing(eager: tuple[Any, Any, Any], other: tuple[Any, Any, Any]) -> list[str]:
    differing = [
        f"step {number}: {name}"
        for number, (before, after) in enumerate(zip(eager[0], other[0], strict=True))
        for name in sorted(before.keys() | after.keys())
        if name not in before or name not in after or not same_bits(before[name], after[name])
    ]
    if eager[1] != other[1]:
        differing.append(f"Python values: {eager[1]} against {other[1]}")
    return differing


def _trained(start: Any, batches: list[Any], recipe: Recipe, config: memopt.Config | None) -> tuple[Any, Any, Any]:
    model = copy.deepcopy(start)
    with _from_the_beginning():
        if config is not None:
            memopt.apply(model, config=config)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="memopt left")
            context = _autocast if recipe.amp else None
            options = {} if context is None else {"context": context}
            observed = [train_step(model, (batch,), **options) for batch in batches]
        values = (
            model._steps,
            model.settings.rate,
            copy.deepcopy(model.table),
            list(models.RATES),
            models.DenseNet.shared,
            random.random(),
            numpy.random.rand(),
            model.generator.random(),
            model.numpy_generator.random(),
            torch.initial_seed(),
        )
    return observed, values, model


def _autocast() -> Any:
    return torch.autocast("cpu", dtype=torch.bfloat16)


@contextmanager
def _from_the_beginning() -> Iterator[None]:
    """The same random numbers and Python values for each of the two; afterwards those of before."""
    states = random.getstate(), numpy.random.get_state()
    random.seed(0)
    numpy.random.seed(0)
    models.RATES[:], models.DenseNet.shared = [1.0], 0.0
    try:
        yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])

"""A comparison with something of everything in it."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from memopt.ir import ChainReport, Explanation
from memopt.measure import GPU, Comparison, Equivalence, StepFigures

MIB = 2**20
REASON = "the concatenated tensor is used elsewhere too [conv2d_3], and its value must stay"


def chain(block: int, number: int, role: str = "layer", reason: str | None = None) -> ChainReport:
    return ChainReport(
        node=f"cat_{block}_{number}",
        module=f"block{block}.layer{number}.norm1",
        source="model.py:53",
        block=block,
        role=role,
        action="rewritten" if reason is None else "rejected",
        level="layer" if reason is None else None,
        numerics="exact" if reason is None else None,
        reason=reason,
    )


@pytest.fixture
def make_chain() -> Callable[..., ChainReport]:
    return chain


@pytest.fixture
def passed() -> Equivalence:
    return Equivalence("exact", True, True, True, 0.0, True, (), 3)


@pytest.fixture
def comparison(passed: Equivalence) -> Comparison:
    blocks = [chain(b, i) for b in (1, 2) for i in range(4)] + [chain(1, 4, "exit"), chain(2, 4, "exit")]
    left = [chain(2, i, reason=REASON) for i in (5, 6, 7, 8)] + [chain(0, 9, "exit", "too [bold]small[/bold]")]
    before = StepFigures(2239201280, 2246246400, None, 2228000768, 0, 2.5, 2)
    after = StepFigures(311427072, 318767104, None, 82103500, 0, 0.7312, 2)
    predicted = StepFigures(2239000000, 2246000000, None, 2228000000, 0, None)
    return Comparison(
        device="cpu",
        device_name="the CPU",
        input_shapes=((64, 3, 32, 32),),
        dtype=torch.float32,
        amp=None,
        explanation=Explanation(True, True, True, (*blocks, *left), ("One note about the model.",)),
        equivalence=passed,
        checked_shapes=((2, 3, 32, 32),),
        target=GPU,
        predicted_before=predicted,
        predicted_after=replace(predicted, activation_peak_bytes=5 * MIB, retained_bytes=MIB),
        before=before,
        after=after,
        notes=("Another note, long enough to be broken into two lines of a terminal that is eighty wide.",),
    )

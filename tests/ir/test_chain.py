"""An explanation as text: every chain that was found, by block."""

import copy
from dataclasses import replace

import pytest

import memopt
from memopt.ir import ChainReport, Explanation
from tests.helpers import dense_net, images

LAYER = ChainReport("cat", "block1.norm1", "model.py:7", 1, "layer", "rewritten", "layer", "exact", None)


def test_chains_are_grouped_by_block_and_level() -> None:
    chains = (
        replace(LAYER, block=0),
        LAYER,
        replace(LAYER, level="concat"),
        replace(LAYER, level="concat"),
        replace(LAYER, block=2, level="keep"),
        replace(LAYER, block=2, node="cat_4", action="rejected", level=None, reason="it is read elsewhere"),
    )
    assert str(Explanation(True, True, True, chains, ("A note.",))).splitlines() == [
        "memopt: 6 chains found, 5 rewritten",
        "  block 1: 1 chain, recompute layer",
        "  block 1: 2 chains, recompute concat",
        "  block 2: 1 chain, kept as eager keeps them",
        "  block 2: cat_4 (model.py:7) left alone, because it is read elsewhere",
        "  in no block: 1 chain, recompute layer",
        "  A note.",
    ]


@pytest.mark.parametrize("copied", [False, True])
def test_before_the_first_step_it_is_not_said_that_there_are_no_chains(copied: bool) -> None:
    model = memopt.apply(dense_net())
    if copied:
        model(images())
        model = copy.deepcopy(model)
    said = str(memopt.explain(model))
    assert "chains" not in said
    assert said == (
        "memopt: Nothing is recorded yet. Run a training forward, or call memopt.apply with example_inputs."
    )
    model(images())
    assert "7 chains found, 7 rewritten" in str(memopt.explain(model))


def test_a_model_without_memopt_says_so() -> None:
    assert str(memopt.explain(dense_net())) == "memopt: memopt.apply is not in force on this model."

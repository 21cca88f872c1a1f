"""Random DenseNets, written in every style, train bit for bit as they would without memopt."""

import copy

import torch
from hypothesis import given, settings

import memopt
from memopt.measure.equivalence import check_equivalence
from tests.property.models import Recipe
from tests.property.recipes import recipes


def assert_exact(recipe: Recipe) -> memopt.Explanation:
    """Two optimiser steps on two batch sizes, every bit; then the model is what it was."""
    torch.manual_seed(0)
    naive = recipe.make()
    rewritten = memopt.apply(copy.deepcopy(naive), config=memopt.Config(recompute=recipe.level))
    batches = [(recipe.inputs(recipe.batch),), (recipe.inputs(recipe.batch + 1),)]

    result = check_equivalence(
        naive, rewritten, batches, steps=2, amp=torch.bfloat16 if recipe.amp else None, repeat_eager=False
    )

    assert result.passed, (recipe, result.differing)
    assert list(rewritten.state_dict()) == list(naive.state_dict())
    explanation = memopt.explain(rewritten)
    assert type(memopt.remove(rewritten)) is type(naive)
    return explanation


@settings(max_examples=220)
@given(recipes())
def test_trains_as_eager_does(recipe: Recipe) -> None:
    explanation = assert_exact(recipe)

    for chain in explanation.rejected:
        assert chain.reason


def test_plain_styles_are_rewritten_completely() -> None:
    for style in ("list", "growing", "prepended"):
        for level in ("concat", "layer"):
            explanation = assert_exact(Recipe(style=style, layers=(3, 2), bottleneck=2, level=level))

            assert explanation.ran
            assert len(explanation.rewritten) == len(explanation.chains) == 7, (style, explanation)

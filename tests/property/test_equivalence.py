"""Random DenseNets, written in every style, train bit for bit as they would without memopt."""

import copy
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings

import memopt
from memopt.measure.equivalence import check_equivalence
from tests.property.models import EFFECTS, HARMLESS, Recipe
from tests.property.recipes import random_recipe, recipes
from tests.property.side_by_side import differences


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
        for level in ("keep", "concat", "layer"):
            explanation = assert_exact(Recipe(style=style, layers=(3, 2), bottleneck=2, level=level))

            assert explanation.ran
            assert len(explanation.rewritten) == len(explanation.chains) == 7, (style, explanation)


@pytest.mark.parametrize("seed", range(24))
def test_effects_of_forward_happen_as_in_eager(seed: int) -> None:
    """A little of what `long_run` does."""
    effect = tuple(EFFECTS)[seed % len(EFFECTS)]
    recipe = replace(random_recipe(random.Random(seed)), effect=effect, amp=False)  # eager must repeat itself

    differing, explanation = differences(recipe)

    assert not differing, recipe
    if recipe.effect not in HARMLESS:
        assert any(".py:" in note for note in explanation.notes), (recipe, explanation)

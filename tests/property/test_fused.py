"""Random DenseNets on fused kernels: as close to float64 as eager, or exact with the reason."""

import copy

import torch
from hypothesis import given, settings

import memopt
from memopt.measure.bound import measure_distance
from tests.property.models import Recipe
from tests.property.recipes import recipes


@settings(max_examples=60)
@given(recipes())
def test_trains_as_close_to_float64_as_eager(recipe: Recipe) -> None:
    torch.manual_seed(0)
    naive = recipe.make()
    rewritten = memopt.apply(copy.deepcopy(naive), config=memopt.Config(numerics="fast", recompute=recipe.level))
    amp = torch.bfloat16 if recipe.amp else None

    distance = measure_distance(naive, rewritten, (recipe.inputs(recipe.batch),), amp=amp, seeds=3)

    explanation = memopt.explain(rewritten)
    fast = [chain for chain in explanation.chains if chain.numerics == "fast"]
    assert not fast or distance.within_bound, (recipe, distance)
    said = " ".join(note.split(" runs exactly")[0] for note in explanation.notes).split()
    assert {str(chain.block) for chain in explanation.chains if chain.numerics == "exact"} <= set(said)


def test_plain_styles_run_on_fused_kernels() -> None:
    for style in ("list", "tuple", "growing", "prepended"):
        for bottleneck in (0, 2):
            recipe = Recipe(style=style, layers=(3, 2), bottleneck=bottleneck)
            rewritten = memopt.apply(recipe.make(), config=memopt.Config(numerics="fast"))
            rewritten(recipe.inputs(2))
            explanation = memopt.explain(rewritten)
            assert {chain.numerics for chain in explanation.chains} == {"fast"}, (style, explanation)

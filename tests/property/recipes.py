"""Which recipes there are: a hypothesis strategy, and what memopt is expected to make of the plain ones."""

import random
from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from tests.property.models import ACTIVATIONS, CONCATS, DROPOUTS, EFFECTS, EXTRAS, NORMS, STYLES, Recipe

MODES = ("train", "train", "eval", "frozen norms", "frozen affine", "one norm frozen")


CHOICES: dict[str, tuple[Any, ...]] = {
    "dimensions": (2, 1, 3),
    "style": STYLES,
    "concat": tuple(CONCATS),
    "layers": ((3,), (1,), (2, 2), (4,), (1, 3)),
    "growth": (3, 1, 4, 5, 13),
    "stem": (4, 1, 6),
    "size": (4, 5, 6),
    "norm": NORMS,
    "activation": tuple(ACTIVATIONS),
    "bottleneck": (0, 2, 4),
    "kernel": (3, 1),
    "groups": (False, False, True),
    "bias": (False, True),
    "padding_mode": ("zeros", "zeros", "reflect"),
    "dropout": DROPOUTS,
    "extra": ("none", *EXTRAS),
    "bare_first": (False, True),
    "returns_list": (False, True),
    "transition": ("pool", "same size", "none"),
    "head": ("classifier", "features"),
    "mode": MODES,
    "frozen_stem": (False, False, True),
    "channels_last": (False, False, True),
    "amp": (False, False, False, True),
    "level": ("layer", "concat", "keep"),
    "batch": (2, 3),
}
"""What each field of a recipe may be; what is written twice is drawn twice as often."""


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Any DenseNet that eager itself can train."""
    return _sensible(Recipe(**{name: draw(st.sampled_from(choices)) for name, choices in CHOICES.items()}))


def random_recipe(generator: random.Random) -> Recipe:
    """The same, drawn evenly, with something that forward does besides computing."""
    drawn = {name: generator.choice(choices) for name, choices in CHOICES.items()}
    effects = tuple(EFFECTS)
    return _sensible(Recipe(**drawn, effect=generator.choice((*["none"] * len(effects), *effects))))


def _sensible(recipe: Recipe) -> Recipe:
    """The nearest recipe that eager accepts."""
    if recipe.dimensions != 2:
        recipe = replace(recipe, channels_last=False)
    if recipe.dimensions == 3:
        recipe = replace(recipe, size=4)
    if recipe.norm.startswith("group") and recipe.frozen_stem:
        recipe = replace(recipe, channels_last=False)  # torch's own backward crashes where the input has no gradient
    if recipe.extra == "late in place" and (recipe.grows or recipe.bare_first):
        recipe = replace(recipe, extra="none")
    if recipe.extra == "activated feature" and recipe.dropout == "in place":
        recipe = replace(recipe, dropout="module")  # would overwrite what ReLU's gradient reads
    if recipe.norm == "layer" and recipe.extra == "shared norm":
        recipe = replace(recipe, extra="none")
    return recipe

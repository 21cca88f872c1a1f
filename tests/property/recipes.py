"""Which recipes there are: a hypothesis strategy, and what memopt is expected to make of the plain ones."""

from dataclasses import replace

from hypothesis import strategies as st

from tests.property.models import ACTIVATIONS, CONCATS, DROPOUTS, EXTRAS, NORMS, STYLES, Recipe

MODES = ("train", "train", "eval", "frozen norms", "frozen affine", "one norm frozen")


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Any DenseNet that eager itself can train."""
    recipe = Recipe(
        dimensions=draw(st.sampled_from((2, 1, 3))),
        style=draw(st.sampled_from(STYLES)),
        concat=draw(st.sampled_from(tuple(CONCATS))),
        layers=draw(st.sampled_from(((3,), (1,), (2, 2), (4,), (1, 3)))),
        growth=draw(st.sampled_from((3, 1, 4, 5, 13))),
        stem=draw(st.sampled_from((4, 1, 6))),
        size=draw(st.sampled_from((4, 5, 6))),
        norm=draw(st.sampled_from(NORMS)),
        activation=draw(st.sampled_from(tuple(ACTIVATIONS))),
        bottleneck=draw(st.sampled_from((0, 2, 4))),
        kernel=draw(st.sampled_from((3, 1))),
        groups=draw(st.sampled_from((False, False, True))),
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(("zeros", "zeros", "reflect"))),
        dropout=draw(st.sampled_from(DROPOUTS)),
        extra=draw(st.sampled_from(("none", *EXTRAS))),
        bare_first=draw(st.booleans()),
        returns_list=draw(st.booleans()),
        transition=draw(st.sampled_from(("pool", "same size", "none"))),
        head=draw(st.sampled_from(("classifier", "features"))),
        mode=draw(st.sampled_from(MODES)),
        frozen_stem=draw(st.sampled_from((False, False, True))),
        channels_last=draw(st.sampled_from((False, False, True))),
        amp=draw(st.sampled_from((False, False, False, True))),
        level=draw(st.sampled_from(("layer", "concat"))),
        batch=draw(st.sampled_from((2, 3))),
    )
    return _sensible(recipe)


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

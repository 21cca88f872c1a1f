"""What a user may choose, and what becomes of it layer by layer."""

import copy
import warnings
from typing import Any

import pytest
import torch

import memopt
from memopt.measure.tracker import StorageTracker
from tests.helpers import dense_net, images, train_step

MIXED = {"block1.layers.0.*": "concat", "block1.*": "layer", "block2.*": "concat"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recompute": "all"}, "recompute is 'all'"),
        ({"recompute": {"block1.*": "concat", "*": "some"}}, "recompute is 'some'"),
        ({"numerics": "quick"}, "numerics is 'quick'"),
    ],
)
def test_a_value_that_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(memopt.ConfigError, match=message):
        memopt.Config(**settings)


def test_the_first_pattern_that_matches_counts() -> None:
    config = memopt.Config(recompute=MIXED)
    paths = ("block1.layers.0.norm1", "block1.layers.1.norm1", "block2.layers.1.norm1", "norm")
    assert [config.level_of(path) for path in paths] == ["concat", "layer", "concat", "layer"]
    assert memopt.Config().level_of("anything") == "layer"
    assert memopt.Config(recompute="concat").level_of("anything") == "concat"


TYPO = {"blok1.*": "concat", "block2.*": "concat", "*": "layer"}


def warned_of(model: torch.nn.Module, *inputs: Any) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        memopt.apply(model, *inputs, config=memopt.Config(recompute=TYPO))
        model(images())
        model(images(3))
    (warning,) = caught
    assert warning.filename == __file__
    return str(warning.message)


@pytest.mark.parametrize("inputs", [(), (images(),)])
def test_a_pattern_that_matches_nothing_is_warned_of_once(inputs: Any) -> None:
    said = warned_of(dense_net(), *inputs)
    assert said == (
        "Config.recompute: the pattern 'blok1.*' matches no layer. There are block1.layers.0.norm1, "
        "block1.layers.1.norm1, block1.layers.2.norm1 and 4 more."
    )


def test_patterns_reach_into_containers_with_hooks() -> None:
    model = dense_net()
    for block in (model.block1, model.block2):
        block.register_forward_hook(lambda module, args, output: None)
    assert "'blok1.*' matches no layer" in warned_of(model)


def test_patterns_reach_into_parts() -> None:
    class Branching(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = dense_net()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.inner(x)
            return y if y.sum() > 0 else -y

    model = memopt.apply(Branching(), config=memopt.Config(recompute={"inner.block2.*": "concat", "iner.*": "keep"}))
    with (
        pytest.warns(UserWarning, match="as it is but for inner"),
        pytest.warns(UserWarning, match="the pattern 'iner") as caught,
    ):
        model(images())
    assert not [w for w in caught if "the pattern 'inner" in str(w.message)]


@pytest.mark.parametrize("numerics", ["exact", "fast"])
def test_levels_are_chosen_layer_by_layer(numerics: Any) -> None:
    naive = dense_net()
    results, saved = [], []
    for recompute in ("layer", MIXED, "concat"):
        config = memopt.Config(numerics=numerics, recompute=recompute)
        model = memopt.apply(copy.deepcopy(naive), config=config)
        results.append(train_step(model, (images(),)))
        with StorageTracker() as tracker:
            before_bytes = tracker.current_bytes
            loss = model(images()).square().sum()
            saved.append(tracker.current_bytes - before_bytes)
        del loss
        levels = {chain.module: chain.level for chain in memopt.explain(model).chains}
        assert levels == {path: config.level_of(path) for path in levels}
    for name, value in results[0].items():
        if isinstance(value, torch.Tensor):
            assert all(torch.equal(value, other[name]) for other in results[1:]), name
    assert saved[0] < saved[1] < saved[2]

"""A duplicate is what `copy.deepcopy` makes."""

import copy
from collections import OrderedDict

import torch

from densenet_models.bc import DenseNet
from memopt.measure.duplicate import duplicate


class Empty(OrderedDict[str, int]):
    """Somebody's own type, which says itself how it is copied."""

    def __deepcopy__(self, memo: dict[int, object]) -> "Empty":
        return Empty(copied=1)


def test_the_duplicate_shares_nothing_and_computes_the_same() -> None:
    model = DenseNet(depth=10).eval()
    model.shared = [empty := {}, empty]
    model.own = Empty()
    made = duplicate(model)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(made(x), model(x))
    for mine, its in zip(model.modules(), made.modules(), strict=True):
        assert type(mine) is type(its)
        assert list(vars(mine)) == list(vars(its))
        for name, value in vars(mine).items():
            assert type(vars(its)[name]) is type(value)
            assert vars(its)[name] is not value or not isinstance(value, (dict, set, list))
    hook = made.register_forward_hook(lambda module, args, output: output + 1)
    assert not model._forward_hooks
    hook.remove()
    assert made.shared[0] is made.shared[1] is not empty
    assert made.own == {"copied": 1} == copy.deepcopy(model).own

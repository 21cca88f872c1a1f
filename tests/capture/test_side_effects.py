"""Python values that forward reads or changes: refused with the line, put back, and never frozen."""

import random
import types
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import memopt
from tests.helpers import assert_same, images, reasons, train_step
from tests.wild.models import CHAINS, Net

RATE = 1.0
RATES = {"rate": [1.0]}


class Stateful(Net):
    """Everything in which a model may hide a value."""

    shared = 0.0

    def __init__(self) -> None:
        super().__init__()
        self._private = 0.0
        self.config = types.SimpleNamespace(rate=1.0)
        self.nested = {"rates": [1.0]}
        self.python_random = random.Random(0)
        self.numpy_random = np.random.default_rng(0)
        self.schedule = iter([1.0 + number / 10 for number in range(100)])
        self.averages = [torch.ones(1)]

    def forward(self, x: torch.Tensor, given: list[float] = [0.0]) -> torch.Tensor:  # noqa: B006
        return self.head(self.block(self.stem(x))) * self.factor(given)

    def factor(self, given: list[float]) -> Any:
        return 1.0


class Private(Stateful):
    def factor(self, given: list[float]) -> Any:
        self._private += 1
        return self._private


class Configuration(Stateful):
    def factor(self, given: list[float]) -> Any:
        self.config.rate *= 1.5
        return self.config.rate


class Nested(Stateful):
    def factor(self, given: list[float]) -> Any:
        self.nested["rates"][0] += 1
        return self.nested["rates"][0]


class OwnPythonRandom(Stateful):
    def factor(self, given: list[float]) -> Any:
        return self.python_random.random()


class OwnNumpyRandom(Stateful):
    def factor(self, given: list[float]) -> Any:
        return float(self.numpy_random.random())


class Iterating(Stateful):
    def factor(self, given: list[float]) -> Any:
        return next(self.schedule)


class StrayTensor(Stateful):
    def factor(self, given: list[float]) -> Any:
        self.averages[0].mul_(0.9)
        return self.averages[0]


class OnItsClass(Stateful):
    def factor(self, given: list[float]) -> Any:
        OnItsClass.shared += 1
        return OnItsClass.shared


class Global(Stateful):
    def factor(self, given: list[float]) -> Any:
        global RATE
        RATE += 1
        return RATE


class InGlobal(Stateful):
    def factor(self, given: list[float]) -> Any:
        RATES["rate"][0] += 1
        return RATES["rate"][0]


class Default(Stateful):
    def factor(self, given: list[float]) -> Any:
        given[0] += 1
        return given[0]


class Seeding(Stateful):
    def factor(self, given: list[float]) -> Any:
        torch.manual_seed(3)
        return F.dropout(torch.ones(5), 0.5, self.training)


class Toggling(Stateful):
    def forward(self, x: torch.Tensor, given: list[float] = [0.0]) -> torch.Tensor:  # noqa: B006
        self.layers[0].norm1.eval()
        result = super().forward(x)
        self.layers[0].norm1.train(self.training)
        return result


def closure() -> Net:
    count = 0.0

    class Closure(Stateful):
        def factor(self, given: list[float]) -> Any:
            nonlocal count
            count += 1
            return count

    return Closure()


CHANGING: dict[Callable[[], Net], str] = {
    Private: "changes self._private",
    Configuration: "changes self.config",
    Nested: "changes self.nested",
    OwnPythonRandom: "draws random numbers",
    OwnNumpyRandom: "draws random numbers",
    Iterating: "advances self.schedule",
    StrayTensor: "no input, parameter or buffer",
    OnItsClass: "changes OnItsClass.shared",
    Global: "changes RATE",
    InGlobal: "changes RATES",
    Default: "changes default given",
    Seeding: "seeds torch's random numbers",
    Toggling: "changes a setting of layers.0.norm1",
    closure: "changes count",
}


def _put_back_globals() -> None:
    global RATE
    RATE = 1.0
    RATES["rate"][:] = [1.0]
    OnItsClass.shared = 0.0
    Stateful.forward.__defaults__[0][:] = [0.0]


def _four_steps(make: Callable[[], Net], apply: bool) -> tuple[Net, list[Any]]:
    _put_back_globals()
    torch.manual_seed(0)
    model = make()
    if apply:
        memopt.apply(model)
    steps = []
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        for _ in range(4):
            steps.append(train_step(model, (images(size=8),)))
    return model, steps


@pytest.mark.parametrize(("make", "reason"), CHANGING.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_what_forward_changes_is_refused_and_changes_as_before(make: Callable[[], Net], reason: str) -> None:
    _, expected = _four_steps(make, apply=False)
    model, actual = _four_steps(make, apply=True)

    for before, after in zip(expected, actual, strict=True):
        assert_same(before, after)
    assert reason in reasons(model)
    where = "models.py" if make is Toggling else "test_side_effects.py"
    assert f"{where}:" in reasons(model)


class Reading(Stateful):
    def factor(self, given: list[float]) -> Any:
        return self.config.rate * self.nested["rates"][0] * RATE * RATES["rate"][0] * self.shared * self._scale()

    def _scale(self) -> float:
        return _helper()


def _helper() -> float:
    return RATES["rate"][-1]


def _change_config(model: Reading) -> None:
    model.config.rate = 3.0


def _change_nested(model: Reading) -> None:
    model.nested["rates"][0] = 3.0


def _change_global(model: Reading) -> None:
    global RATE
    RATE = 3.0


def _change_in_global(model: Reading) -> None:
    RATES["rate"][0] = 3.0


def _change_class(model: Reading) -> None:
    Stateful.shared = 3.0


@pytest.mark.parametrize("change", [_change_config, _change_nested, _change_global, _change_in_global, _change_class])
def test_what_changes_between_steps_is_recorded_again(change: Callable[[Reading], None]) -> None:
    results = []
    for apply in (False, True):
        _put_back_globals()
        Stateful.shared = 1.0
        torch.manual_seed(0)
        model = Reading()
        if apply:
            memopt.apply(model)
        first = train_step(model, (images(size=8),))
        change(model)
        results.append((first, train_step(model, (images(size=8),))))
    Stateful.shared = 0.0

    for expected, actual in zip(*results, strict=True):
        assert_same(expected, actual)
    assert len(memopt.explain(model).rewritten) == CHAINS

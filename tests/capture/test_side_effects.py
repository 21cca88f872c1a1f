"""Python values that forward reads or changes: refused with the line, put back, and never frozen."""

import functools
import itertools
import math
import random
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

import memopt
from memopt.capture.frozen import Same
from tests.helpers import assert_same, images, reasons, train_step
from tests.wild.models import CHAINS, Net

RATE = 1.0
RATES = {"rate": [1.0]}
LAST: torch.Tensor | None = None


class Schedule:
    """A value that is called for."""

    def __init__(self) -> None:
        self.rate = 1.0

    def __call__(self) -> float:
        return self.rate

    def advance(self) -> float:
        self.rate += 1
        return self.rate


@dataclass(slots=True)
class Slots:
    """A configuration without a dictionary."""

    rate: float = 1.0
    steps: Any = None


def _twice(rate: float) -> float:
    return 2 * rate


def counting(function: Callable[..., float]) -> Callable[..., float]:
    """A decorator that counts calls."""
    calls = 0

    @functools.wraps(function)
    def counted(*args: Any) -> float:
        nonlocal calls
        calls += 1
        return function(*args) * calls

    return counted


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
        self.scheduled = Schedule()
        self.slots = Slots(steps=itertools.count())
        self.draw = random.Random(0).random
        self.read = self.scheduled.__call__
        self.partial = functools.partial(_twice, rate=1.0)
        self.function: Callable[[], float] = lambda: 1.0

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


class Wrapped(Stateful):
    @counting
    def factor(self, given: list[float]) -> Any:
        return 1.0


class CallingAnObject(Stateful):
    def factor(self, given: list[float]) -> Any:
        return self.scheduled.advance()


class CallingAMethod(Stateful):
    def __init__(self) -> None:
        super().__init__()
        self.step = Schedule().advance

    def factor(self, given: list[float]) -> Any:
        return self.step()


class InSlots(Stateful):
    def factor(self, given: list[float]) -> Any:
        self.slots.rate += 1
        return self.slots.rate


class IteratingInside(Stateful):
    def factor(self, given: list[float]) -> Any:
        return 1.0 + next(self.slots.steps)


class Drawing(Stateful):
    def factor(self, given: list[float]) -> Any:
        return self.draw()


class OnAFunction(Stateful):
    def factor(self, given: list[float]) -> Any:
        _twice.calls += 1  # type: ignore[attr-defined]
        return _twice.calls  # type: ignore[attr-defined]


class GlobalTensor(Stateful):
    def forward(self, x: torch.Tensor, given: list[float] = [0.0]) -> torch.Tensor:  # noqa: B006
        global LAST
        LAST = self.stem(x)
        return self.head(self.block(LAST))


class ByType(Stateful):
    def factor(self, given: list[float]) -> Any:
        return 2.0 if type(self.averages[0]) is torch.Tensor else 3.0


class Printing(Stateful):
    def forward(self, x: torch.Tensor, given: list[float] = [0.0]) -> torch.Tensor:  # noqa: B006
        return super().forward(x) * len(str(x.mean()))


class Flagging(Stateful):
    def forward(self, x: torch.Tensor, given: list[float] = [0.0]) -> torch.Tensor:  # noqa: B006
        with torch.backends.mkldnn.flags(enabled=False):
            return super().forward(x)


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


def _wrapped() -> Net:
    cells = Wrapped.factor.__closure__ or ()
    (counter,) = [cell for cell in cells if isinstance(cell.cell_contents, int)]
    counter.cell_contents = 0
    return Wrapped()


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
    _wrapped: "changes calls",
    CallingAnObject: "changes self.scheduled",
    CallingAMethod: "changes self.step",
    InSlots: "changes self.slots",
    IteratingInside: "advances an iterator in self.slots",
    Drawing: "draws random numbers",
    OnAFunction: "changes an attribute of _twice",
    GlobalTensor: "changes LAST",
    ByType: "compares a type with torch.Tensor",
    Printing: "prints a tensor or makes text of it",
    Flagging: "sets a flag of torch.backends",
    closure: "changes count",
}


def _put_back_globals() -> None:
    global RATE
    RATE = 1.0
    RATES["rate"][:] = [1.0]
    OnItsClass.shared = 0.0
    _twice.calls = 0.0  # type: ignore[attr-defined]
    global LAST
    LAST = None
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
        products = (self.scheduled(), self.slots.rate, self.read(), self.partial(), self.function())
        known = self.config.rate * self.nested["rates"][0] * RATE * RATES["rate"][0] * self.shared * self._scale()
        return known * math.prod(products)

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


def _change_object(model: Reading) -> None:
    model.scheduled.rate = 3.0


def _change_slots(model: Reading) -> None:
    model.slots.rate = 3.0


def _change_partial(model: Reading) -> None:
    model.partial.keywords["rate"] = 3.0


def _change_function(model: Reading) -> None:
    """To one that lies at the same address, if it comes to that."""
    model.function = None  # type: ignore[assignment]
    model.function = lambda: 3.0


@pytest.mark.parametrize(
    "change",
    [
        _change_config,
        _change_nested,
        _change_global,
        _change_in_global,
        _change_class,
        _change_object,
        _change_slots,
        _change_partial,
        _change_function,
    ],
)
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


def test_another_object_at_the_same_address_is_not_the_same() -> None:
    class Thing:
        pass

    first, second = Thing(), Thing()
    known = Same(first)
    assert known == Same(first) != Same(second)
    known._hash = id(second)  # as if the second had been given the first's place
    assert known != Same(second)
    del first
    assert known != Same(second)
    assert hash(known) == hash(Same(second)), "it was compared"


class Growing(Stateful):
    """Makes a layer, a parameter and a buffer at its first forward."""

    def forward(self, x: torch.Tensor, given: list[float] = [0.0]) -> torch.Tensor:  # noqa: B006
        if not hasattr(self, "extra"):
            self.extra = nn.Linear(5, 5)
            self.scale = nn.Parameter(torch.ones(5))
            self.register_buffer("offset", torch.ones(5))
        return self.extra(super().forward(x)) * self.scale + self.offset


@functools.cache
def _weights(count: int) -> torch.Tensor:
    return torch.linspace(1, 2, count)


class Cached(Stateful):
    def factor(self, given: list[float]) -> Any:
        return _weights(5)


class Calling(Stateful):
    """Hands features to whom it was told to."""

    def forward(self, x: torch.Tensor, given: Any = None) -> torch.Tensor:
        features = self.block(self.stem(x))
        given(features)
        return self.head(features)


def _steps(make: Callable[[], Net], apply: bool) -> tuple[Net, list[Any], list[torch.Tensor]]:
    """Three steps, with the features that a callback was given."""
    _weights.cache_clear()
    torch.manual_seed(0)
    model = make()
    seen: list[torch.Tensor] = []
    if apply:
        memopt.apply(model)
    steps: list[Any] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for _ in range(3):
            model.zero_grad()
            result = model(images(size=8), seen.append) if make is Calling else model(images(size=8))
            result.square().sum().backward()
            steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    return model, steps, seen


@pytest.mark.parametrize("make", [Growing, Cached, Calling])
def test_no_tensor_without_data_is_left_behind(make: Callable[[], Net]) -> None:
    _, expected, expected_seen = _steps(make, apply=False)
    model, actual, seen = _steps(make, apply=True)

    for before, after in zip(expected, actual, strict=True):
        assert_same(before, after)
    kept = [*model.state_dict(keep_vars=True).values(), *seen, _weights(5)]
    assert not any(isinstance(tensor, FakeTensor) for tensor in kept)
    assert len(seen) == len(expected_seen)


def test_what_is_recorded_at_every_step_is_told() -> None:
    model = memopt.apply(Stateful())

    def train() -> None:
        for step in range(20):
            model.steps = step
            train_step(model, (images(size=8),))

    with pytest.warns(UserWarning, match=r"recorded the forward of Stateful 16 times in 16 calls.*self\.steps changed"):
        train()


def test_a_lazy_module_is_recorded_once_it_has_its_shapes() -> None:
    class Lazy(Net):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.LazyConv2d(8, 3, padding=1)

    results = []
    for apply in (False, True):
        torch.manual_seed(0)
        model = Lazy()
        if apply:
            memopt.apply(model)
        results.append([train_step(model, (images(size=8),)) for _ in range(3)])

    for expected, actual in zip(*results, strict=True):
        assert_same(expected, actual)
    assert len(memopt.explain(model).rewritten) == CHAINS

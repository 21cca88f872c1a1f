"""Values as trees: which hold tensors, and that dataclasses are built again from their parts."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from memopt.ir import flattened, holds_tensor


class Plain:
    """No dataclass."""

    def __init__(self, held: Any) -> None:
        self.held = held


class Base:
    """Has a slot of its own."""

    __slots__ = ("extra",)


@dataclass(frozen=True, slots=True)
class Pair(Base):
    """Frozen, with slots."""

    tensor: torch.Tensor
    name: str


@dataclass
class Checked:
    """Does in `__post_init__` what must not be done twice."""

    tensor: torch.Tensor

    def __post_init__(self) -> None:
        self.tensor = self.tensor + 1


def test_whether_a_value_holds_a_tensor() -> None:
    x = torch.zeros(1)
    circle: list[Any] = []
    circle.append(circle)

    assert all(map(holds_tensor, [x, [x], {"a": (x,)}, Plain(x), Checked(x), lambda: x, Plain([Plain(x)])]))  # type: ignore[arg-type]
    assert not any(map(holds_tensor, [None, 3, "x", circle, nn.Linear(1, 1), torch.float32, lambda: 3, Plain]))
    assert flattened([3, "x", Plain])[0] == [3, "x", Plain]


def test_dataclasses_are_built_again_from_their_parts() -> None:
    x = torch.zeros(2)
    pair = Pair(x, "a")
    object.__setattr__(pair, "extra", (x, 3))

    leaves, spec = flattened({"pair": [pair], "checked": Checked(x), "number": 3})
    again = pytree.tree_unflatten([leaf + 5 if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves], spec)

    (built,) = again["pair"]
    assert (type(built), built.name, built.tensor.tolist(), again["number"]) == (Pair, "a", [5, 5], 3)
    assert built.extra[0].tolist() == [5, 5]
    assert built.extra[1] == 3
    assert again["checked"].tensor.tolist() == [6, 6]
    assert flattened({"pair": [Pair(x, "b")]})[1] == flattened({"pair": [Pair(x + 1, "c")]})[1]

"""A function's operations as data: what is made, what runs on which parts of it, and what comes out."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor as a part of a slot, `offset` elements from its beginning."""

    slot: int
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Make:
    """A new tensor, of zeros or of anything."""

    place: Place
    zeros: bool


@dataclass(frozen=True, slots=True)
class Run:
    """An operator on tensors (`Place`) and other arguments; `made` are the tensors that it makes itself.

    `made` has an entry for each result: its place, or None where the result is one of the arguments.
    """

    operator: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    made: tuple[Place | None, ...]

    def places(self) -> list[Place]:
        """Of all arguments."""
        return [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Place)]


@dataclass(frozen=True, slots=True)
class Recording:
    """What a function did.

    Attributes:
        externals: places of the arguments, which are the first slots.
        sizes_bytes: of every slot.
        actions: in order.
        outputs: places of the results that are handed out; None as it is.
        saved: places of the results that are kept for backward.
    """

    externals: tuple[Place, ...]
    sizes_bytes: tuple[int, ...]
    actions: tuple[Make | Run, ...]
    outputs: tuple[Place | None, ...]
    saved: tuple[Place, ...]

"""Eager in little memory: what is cheap to compute again is not kept for backward.

The untouched forward runs, whatever it is written like; autograd builds its own graph of it and runs its own kernels in
its own order. But where autograd saves what a concat, a norm or a pointwise operation made, it saves how that was made
instead, out of tensors that are kept: results of convolutions and of whatever else is not cheap. So the memory of a
dense network is linear in its depth, and the bits are eager's. Nothing of capture, find, plan or runtime takes part,
which is why they can be judged by it.
"""

import operator
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_BATCH_NORMS = frozenset({_aten.native_batch_norm.default, _aten.cudnn_batch_norm.default})
_RUNNING = slice(3, 5)
"""Where a batch norm is given its running statistics, which it writes to without its schema saying so."""
_CHEAP = _BATCH_NORMS | {
    _aten.cat.default,
    _aten.clone.default,
    _aten._to_copy.default,
    _aten._unsafe_view.default,
    _aten.index_select.default,
    _aten.native_group_norm.default,
    _aten.native_layer_norm.default,
    _aten._prelu_kernel.default,
}
MOST_STEPS = 12
"""What was made in more steps than these out of what is kept is kept itself: else a sum that runs through the whole
network would be computed from its beginning each time."""
_REMEMBERED = 4
"""Tensors computed again that are held for the next to ask: concat, norm and activation of one layer."""

_Geometry: TypeAlias = tuple[torch.dtype, int, torch.Size, tuple[int, ...]]


class _Kept:
    """A tensor as it was when an operation read it."""

    __slots__ = ("__weakref__", "tensor")

    steps = 0

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor.detach()


class _Computed:
    """How to compute a tensor again: its operator, and what that read (`_Kept` or `_Computed` in place of tensors)."""

    __slots__ = ("args", "func", "kwargs", "size", "steps", "stride")

    def __init__(self, func: Any, args: list[Any], kwargs: dict[str, Any]) -> None:
        self.func, self.args, self.kwargs = func, args, kwargs
        self.steps = 1 + _most_steps(args)
        self.stride: tuple[int, ...] = ()
        self.size = torch.Size()


_Value: TypeAlias = _Kept | _Computed


@contextmanager
def recomputing() -> Iterator[None]:
    """For a forward that runs inside: its backward, also after the block, computes again what was not kept.

    Outputs, gradients and buffers have the bits that they have without. There is no double backward.
    """
    again = _Again()
    mode = _Recomputing()
    with mode, torch.autograd.graph.saved_tensors_hooks(mode.pack, again.unpack):
        yield


class _Recomputing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes of every tensor of a forward how it was made, as far as that is cheap, for as long as the tensor lives."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._computed: WeakKeyDictionary[torch.UntypedStorage, dict[_Geometry, _Computed]] = WeakKeyDictionary()
        # Alive as long as what was computed from them; by storage, to find them when that is written to.
        self._kept: dict[int, WeakValueDictionary[_Geometry, _Kept]] = {}
        self._parts = _Parts()

    def pack(self, tensor: torch.Tensor) -> torch.Tensor | _Computed:
        """What autograd saves in place of a tensor."""
        return self._known(tensor) or tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        computed = self._how(func, args, kwargs)  # before it runs: it may write to what it reads
        for tensor in _written(func, args, kwargs):
            self._forget(tensor)
        result = func(*args, **kwargs)
        made = result[0] if isinstance(result, (tuple, list)) else result
        if computed is not None and made.layout is torch.strided:
            computed.size, computed.stride = made.size(), made.stride()
            self._computed.setdefault(made.untyped_storage(), {})[_geometry(made)] = computed
        return result

    def _how(self, func: Any, args: Any, kwargs: dict[str, Any]) -> _Computed | None:
        if not _is_cheap(func) or any(isinstance(value, torch.Tensor) for value in kwargs.values()):
            return None
        if (func.is_view or func._schema.is_mutable) and self._known(args[0]) is None:
            return None  # of a tensor that is kept, both are kept too
        if func is _aten.cat.default:
            values: list[Any] = [self._parts.find(args[0], self._values), *args[1:]]
            values[0] = _flat(values)
        else:
            values = [self._values(argument) for argument in args]
        computed = _Computed(func, values, kwargs)
        return computed if computed.steps <= MOST_STEPS else None

    def _values(self, argument: Any) -> Any:
        if isinstance(argument, torch.Tensor):
            return self._known(argument) or self._keep(argument)
        return [self._values(a) for a in argument] if isinstance(argument, (list, tuple)) else argument

    def _known(self, tensor: torch.Tensor) -> _Computed | None:
        views = self._computed.get(tensor.untyped_storage()) if tensor.layout is torch.strided else None
        return None if views is None else views.get(_geometry(tensor))

    def _keep(self, tensor: torch.Tensor) -> _Kept:
        if tensor.layout is not torch.strided:
            return _Kept(tensor)
        storage, geometry = tensor.untyped_storage()._cdata, _geometry(tensor)
        views = self._kept.get(storage)
        if views is None:
            views = self._kept[storage] = WeakValueDictionary()
        kept = views.get(geometry)
        if kept is None:
            kept = views[geometry] = _Kept(tensor)
        return kept

    def _forget(self, tensor: torch.Tensor) -> None:
        """A storage is about to be written to: who needs what it holds now gets a copy."""
        storage = tensor.untyped_storage()
        self._parts.forget(storage._cdata)
        self._computed.pop(storage, None)
        for kept in self._kept.pop(storage._cdata, {}).values():
            kept.tensor = kept.tensor.clone()


class _Parts:
    """The parts of the latest concat: most begin with those of the one before, of which a deep network has thousands.

    It keeps them alive, which the network itself does until its next concat.
    """

    def __init__(self) -> None:
        self._tensors: list[torch.Tensor] = []
        self._values: list[Any] = []
        self._storages: set[int] = set()

    def find(self, tensors: Sequence[torch.Tensor], value_of: Callable[[torch.Tensor], _Value]) -> list[_Value]:
        """A value for each tensor."""
        known = len(self._tensors)
        if known > len(tensors) or not all(map(operator.is_, self._tensors, tensors)):
            self.clear()
            known = 0
        new = tensors[known:]
        self._tensors += new
        self._values += map(value_of, new)
        self._storages.update(t.untyped_storage()._cdata for t in new if t.layout is torch.strided)
        return self._values[:]

    def forget(self, storage: int) -> None:
        """It is about to be written to."""
        if storage in self._storages:
            self.clear()

    def clear(self) -> None:
        """Know no parts."""
        self._tensors, self._values, self._storages = [], [], set()


class _Again:
    """Computes again in backward, and remembers the latest."""

    def __init__(self) -> None:
        self._latest: OrderedDict[_Computed, torch.Tensor] = OrderedDict()

    def unpack(self, saved: torch.Tensor | _Computed) -> torch.Tensor:
        """What autograd had saved."""
        if isinstance(saved, torch.Tensor):
            return saved
        with torch.no_grad():
            return self._compute(saved)

    def _compute(self, value: _Value) -> torch.Tensor:
        if isinstance(value, _Kept):
            return value.tensor
        if value in self._latest:
            self._latest.move_to_end(value)
            return self._latest[value]
        args = self._tensors(value.args)
        if value.func._schema.is_mutable:
            args[0] = args[0].clone()
        if value.func in _BATCH_NORMS:
            args[_RUNNING] = [None if running is None else running.clone() for running in args[_RUNNING]]
        result = value.func(*args, **value.kwargs)
        made: torch.Tensor = result[0] if isinstance(result, (tuple, list)) else result
        if made.stride() != value.stride:
            made = torch.empty_strided(value.size, value.stride, dtype=made.dtype, device=made.device).copy_(made)
        self._latest[value] = made
        if len(self._latest) > _REMEMBERED:
            self._latest.popitem(last=False)
        return made

    def _tensors(self, values: Any) -> Any:
        """A list of arguments, with tensors in place of values; a concat's are many, so no tree is built of them."""
        if isinstance(values, list):
            return [value.tensor if type(value) is _Kept else self._tensors(value) for value in values]
        return self._compute(values) if isinstance(values, (_Kept, _Computed)) else values


def _most_steps(values: Any) -> int:
    if isinstance(values, (_Kept, _Computed)):
        return values.steps
    return max(map(_most_steps, values), default=0) if isinstance(values, list) else 0


@cache
def _is_cheap(func: Any) -> bool:
    """Whether an operator costs little and makes the same again of the same: one tensor, or a norm's three."""
    schema = func._schema
    if torch.Tag.nondeterministic_seeded in func.tags:
        return False
    in_place = schema.name.endswith("_") and _writes(schema) == [schema.arguments[0].name]
    if schema.is_mutable and not in_place:
        return False
    is_one = len(schema.returns) == 1 and str(schema.returns[0].type) == "Tensor"
    return func in _CHEAP or (is_one and (func.is_view or torch.Tag.pointwise in func.tags))


def _writes(schema: Any) -> list[str]:
    return [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]


def _flat(values: list[Any]) -> list[Any]:
    """The parts of a concat; those of another along the same dimension in its place, or concats that grow from layer
    to layer would each be computed from the first one on."""
    parts: list[Any] = []
    for part in values[0]:
        nested = isinstance(part, _Computed) and part.func is _aten.cat.default and part.args[1:] == values[1:]
        parts += part.args[0] if nested else (part,)
    return parts


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    if not func._schema.is_mutable:
        return []
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    leaves = pytree.tree_leaves([given.get(name) for name in _writes(func._schema)])
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided]


def _geometry(tensor: torch.Tensor) -> _Geometry:
    return tensor.dtype, int(tensor.storage_offset()), tensor.size(), tensor.stride()

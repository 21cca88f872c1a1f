"""Write down what a function does with tensors, by running it on fake ones."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    in_kernel_invocation_manager,
)
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from memopt.runtime.tape.program import Make, Place, Recording, Run

Description = tuple[torch.dtype, torch.device, tuple[int, ...], tuple[int, ...]]
Results = tuple[Sequence[torch.Tensor | None], Sequence[torch.Tensor]]


class NotTapedError(Exception):
    """The function does something that a tape cannot hold; its text says what."""


def described(tensor: torch.Tensor) -> Description:
    """All that a recording may depend on of a tensor."""
    return tensor.dtype, tensor.device, tuple(tensor.shape), tensor.stride()


def record(function: Callable[[list[torch.Tensor]], Results], externals: Sequence[Description]) -> Recording:
    """Run `function` on fake tensors like `externals`; it returns what it hands out, and what is kept for backward.

    Raises:
        NotTapedError: it uses a tensor from elsewhere, or the value of one.
    """
    with _disable_current_modes(), torch.no_grad():
        metas = [torch.empty_strided(size, stride, dtype=d, device="meta") for d, _, size, stride in externals]
        mode = FakeTensorMode()
        fakes: list[torch.Tensor] = [
            FakeTensor(mode, meta, device) for meta, (_, device, *_) in zip(metas, externals, strict=True)
        ]
    with _disable_current_modes(), mode, torch.no_grad():
        recorder = _Recorder(mode, fakes)
        try:
            with recorder:
                outputs, saved = function(list(fakes))
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise NotTapedError(f"it needs the value of a tensor ({error})") from error
        return recorder.finish(outputs, saved)


_EMPTY = {"aten::empty.memory_format", "aten::empty_strided", "aten::empty_like", "aten::new_empty"}
_ZEROS = {"aten::zeros", "aten::zeros_like", "aten::new_zeros"}


class _Recorder(TorchDispatchMode):
    """Most of what happens needs no fake operator, which takes its time: views and new tensors are made as meta
    tensors make them, and what only writes into its arguments is not run at all."""

    def __init__(self, mode: FakeTensorMode, externals: list[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._mode = mode
        self._slots: dict[int, int] = {}
        self._sizes: list[int] = []
        self._alive: list[torch.Tensor] = []  # an address names a storage only while it lives
        self._actions: list[Make | Run] = []
        self._externals = tuple(map(self._fresh, externals))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.name()
        if name == "prim::device":  # asked at every index
            return args[0].fake_device
        if func.is_view:
            self._place(args[0])  # refuses what comes from elsewhere
            if name == "aten::detach":  # so a new tensor becomes a variable; there is no graph to leave
                return args[0]
            return self._as_meta(func, args, kwargs, args[0].device)
        if name in _EMPTY or name in _ZEROS:
            device = kwargs.get("device") or args[0].device
            made = self._as_meta(func, args, kwargs | {"device": torch.device("meta")}, device)
            self._actions.append(Make(self._fresh(made), name in _ZEROS))
            return made
        # Arguments first: what the operator makes has no slot yet.
        placed = Run(func, self._placed(args), self._placed(kwargs), ())
        if func.namespace == "memopt" or _only_writes(func):
            self._actions.append(placed)
            return args[0] if func._schema.returns else None
        result = func(*args, **kwargs)
        results = result if isinstance(result, (tuple, list)) else (result,)
        fresh = [isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in self._slots for t in results]
        if any(fresh) or (func._schema.is_mutable and torch.Tag.inplace_view not in func.tags):
            places = [self._fresh(t) if new else None for t, new in zip(results, fresh, strict=True)]
            self._actions.append(replace(placed, made=tuple(places)))
        return result

    def finish(self, outputs: Sequence[torch.Tensor | None], saved: Sequence[torch.Tensor]) -> Recording:
        return Recording(
            self._externals,
            tuple(self._sizes),
            tuple(self._actions),
            tuple(None if t is None else self._place(t) for t in outputs),
            tuple(map(self._place, saved)),
        )

    def _as_meta(self, func: Any, args: Any, kwargs: Any, device: torch.device) -> torch.Tensor:
        with in_kernel_invocation_manager(self._mode):
            result = func(*args, **kwargs)
        if not isinstance(result, torch.Tensor):
            raise NotTapedError(f"{func.name()} returns several views")
        return FakeTensor(self._mode, result, device)

    def _placed(self, value: Any) -> Any:
        """The same with a place for every tensor."""
        if isinstance(value, torch.Tensor):
            return self._place(value)
        if isinstance(value, (tuple, list)):
            return type(value)([self._placed(item) for item in value])
        if isinstance(value, dict):
            return {key: self._placed(item) for key, item in value.items()}
        return value

    def _fresh(self, tensor: torch.Tensor) -> Place:
        """The place of a tensor that is new, or of the same new storage as the one before."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._slots:
            self._alive.append(tensor)
            self._slots[storage._cdata] = len(self._sizes)
            self._sizes.append(storage.nbytes())
        return self._place(tensor)

    def _place(self, tensor: torch.Tensor) -> Place:
        slot = self._slots.get(tensor.untyped_storage()._cdata)
        if slot is None:
            raise NotTapedError(f"a tensor {tuple(tensor.shape)} comes from elsewhere")
        return Place(slot, int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride(), tensor.dtype)


@cache
def _only_writes(func: Any) -> bool:
    """Whether an operator's one result, if it has any, is the first argument, written to."""
    schema = func._schema
    if not schema.is_mutable or torch.Tag.inplace_view in func.tags:
        return False
    if not schema.returns:
        return True
    returned, first = schema.returns[0].alias_info, schema.arguments[0].alias_info
    same = returned is not None and first is not None and returned.before_set == first.before_set
    return len(schema.returns) == 1 and same

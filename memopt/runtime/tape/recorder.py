"""Write down what a function does with tensors, by running it on fake ones."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils import _pytree as pytree
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
    with _disable_current_modes(), FakeTensorMode(), torch.no_grad():
        fakes = [torch.empty_strided(size, stride, dtype=d, device=where) for d, where, size, stride in externals]
        recorder = _Recorder(fakes)
        try:
            with recorder:
                outputs, saved = function(list(fakes))
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise NotTapedError(f"it needs the value of a tensor ({error})") from error
        return recorder.finish(outputs, saved)


_EMPTY = {"aten::empty.memory_format", "aten::empty_strided", "aten::empty_like", "aten::new_empty"}
_ZEROS = {"aten::zeros", "aten::zeros_like", "aten::new_zeros"}


class _Recorder(TorchDispatchMode):
    def __init__(self, externals: list[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._slots: dict[int, int] = {}
        self._sizes: list[int] = []
        self._alive: list[torch.Tensor] = []  # an address names a storage only while it lives
        self._actions: list[Make | Run] = []
        self._externals = tuple(map(self._fresh, externals))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor):
                self._place(leaf)  # refuses what comes from elsewhere
        result = func(*args, **(kwargs or {}))
        made = [t for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
        fresh = [t.untyped_storage()._cdata not in self._slots for t in made]
        if not any(fresh):
            if func._schema.is_mutable:
                self._actions.append(self._run(func, args, kwargs, [None for _ in made]))
            return result  # a view is only another place
        name = func.name()
        if name in _EMPTY or name in _ZEROS:
            self._actions.append(Make(self._fresh(result), name in _ZEROS))
            return result
        # Arguments first: what the operator makes has no slot yet.
        action = self._run(func, args, kwargs, [])
        places = [self._fresh(t) if new else None for t, new in zip(made, fresh, strict=True)]
        self._actions.append(Run(action.operator, action.args, action.kwargs, tuple(places)))
        return result

    def finish(self, outputs: Sequence[torch.Tensor | None], saved: Sequence[torch.Tensor]) -> Recording:
        return Recording(
            self._externals,
            tuple(self._sizes),
            tuple(self._actions),
            tuple(None if t is None else self._place(t) for t in outputs),
            tuple(map(self._place, saved)),
        )

    def _run(self, func: Any, args: Any, kwargs: Any, made: list[Place | None]) -> Run:
        placed_args, placed_kwargs = pytree.tree_map_only(torch.Tensor, self._place, (args, kwargs or {}))
        return Run(func, tuple(placed_args), placed_kwargs, tuple(made))

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

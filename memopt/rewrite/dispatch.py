"""Which forward runs: decided at every call from the inputs and from the state of the modules."""

import os
import sys
import threading
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from memopt.capture import Place, is_recording, outside_places, outside_signature
from memopt.errors import CaptureError
from memopt.ir import Explanation, first_names, flattened
from memopt.rewrite.install import installed
from memopt.rewrite.signature import Signature, input_signature, mode_signature, module_signature

Plain = Callable[..., Any]

_FOLDERS = *torch.__path__, os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_NOT_THE_USERS = *(folder + os.sep for folder in _FOLDERS), "<eval_with_key>"
"""How file names begin whose frames are not the user's: torch, this package, generated forwards."""

CACHED_FORWARDS = 32
"""Rewritten forwards kept for one module. The least recently used one goes first."""


@dataclass(frozen=True, slots=True)
class Boundary:
    """A container with hooks, which was not looked into: its path, and how many chains were recorded before it."""

    path: str
    position: int


@dataclass(frozen=True, slots=True)
class RewrittenForward:
    """A forward for one signature.

    Attributes:
        function: called with the live module and the input tensors; returns the flat outputs. None where nothing
            was rewritten: the module's own forward runs.
        output_spec: how to rebuild the result from the flat outputs.
        explanation: what was found and done.
        boundaries: the containers with hooks that it calls.
    """

    function: Callable[..., tuple[Any, ...]] | None
    output_spec: pytree.TreeSpec | None
    explanation: Explanation
    boundaries: tuple[Boundary, ...] = ()


REFUSALS = 3
"""Recordings that may fail for one reason before no other is tried."""

Build = Callable[[nn.Module, Plain, tuple[Any, ...], dict[str, Any]], RewrittenForward]
Descend = Callable[[nn.Module], None]


class Rewriter:
    """Keeps one rewritten forward per signature of one module; builds it when it is first needed.

    Args:
        build: makes a rewritten forward for a module and its inputs; raises CaptureError where it cannot.
        descend: called with a module whose forward cannot be recorded, to try those inside it.
        warned: reasons that the user has been told, shared with the rewriters of the modules inside.
    """

    def __init__(self, build: Build, descend: Descend = lambda module: None, warned: set[str] | None = None) -> None:
        self._build = build
        self._descend = descend
        self._warned = set[str]() if warned is None else warned
        self._cache: OrderedDict[Signature, RewrittenForward] = OrderedDict()
        self._lock = threading.Lock()
        self._refusals: Counter[str] = Counter()
        self._outside: list[Place] | None = None
        self.latest: RewrittenForward | None = None
        self.ran = False

    def run(self, module: nn.Module, plain: Plain, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The rewritten forward where gradients are recorded and it can run; else the module's own."""
        if not torch.is_grad_enabled() or _under_another_tool() or self._gave_up():
            return plain(module, *args, **kwargs)
        leaves, _ = flattened((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if not tensors or not all(type(t) in (torch.Tensor, nn.Parameter, FakeTensor) for t in tensors):
            return plain(module, *args, **kwargs)
        try:
            rewritten = self.prepare(module, plain, args, kwargs)
        except CaptureError as error:
            refusal = str(error)
        else:
            if rewritten.function is None or rewritten.output_spec is None:
                return plain(module, *args, **kwargs)
            self.ran = True
            return pytree.tree_unflatten(rewritten.function(module, *tensors), rewritten.output_spec)
        self._descend(module)
        key = self._key(module, args, kwargs)
        result = plain(module, *args, **kwargs)  # where this raises too, the fault is not the recording's
        self._leave_alone(module, key, refusal)
        return result

    def _gave_up(self) -> bool:
        """A forward that changes the module at every step has a new signature each time: do not record forever."""
        return any(count >= REFUSALS for count in self._refusals.values())

    def note(self, text: str) -> None:
        """Add a sentence to what `explain` says."""
        if self.latest is not None:
            known = self.latest.explanation
            self.latest = replace(self.latest, explanation=replace(known, notes=(*known.notes, text)))

    def rewrite_parts(self, module: nn.Module, explanation: Explanation) -> RewrittenForward:
        """Try the modules inside instead; `explanation` is what is known to come of that."""
        self._descend(module)
        self.latest = RewrittenForward(None, None, explanation)
        return self.latest

    def prepare(
        self, module: nn.Module, plain: Plain, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> RewrittenForward:
        """The rewritten forward for these inputs, from the cache or new.

        Raises:
            CaptureError: forward cannot be recorded.
        """
        key = self._key(module, args, kwargs)
        with self._lock:
            found = self._cache.get(key)
            if found is None:
                found = self._build(module, plain, args, kwargs)
                self._outside = outside_places(module)  # modules may have been replaced by others
                self._remember(self._key(module, args, kwargs), found)  # boundaries have got a class of their own
            self._remember(key, found)
        return found

    def _key(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Signature:
        if self._outside is None:
            self._outside = outside_places(module)
        return (*_key(module, args, kwargs), outside_signature(self._outside))

    def _remember(self, key: Signature, found: RewrittenForward) -> None:
        self._cache[key] = found
        self._cache.move_to_end(key)
        if len(self._cache) > CACHED_FORWARDS:
            self._cache.popitem(last=False)
        self.latest = found

    def _leave_alone(self, module: nn.Module, key: Signature, reason: str) -> None:
        """From now on the module's own forward, with a warning the first time that there is this reason for it."""
        text = f"memopt left {type(module).__name__} as it is{_but_for(module)}: {reason}"
        with self._lock:
            self._remember(key, RewrittenForward(None, None, Explanation(True, False, False, (), (text,))))
            self._refusals[reason] += 1
            first = reason not in self._warned
            self._warned.add(reason)
        if first:
            warnings.warn(text, stacklevel=callers_level())


def _but_for(module: nn.Module) -> str:
    """The largest submodules that are rewritten instead, where there are any."""
    paths: list[str] = []
    for path, child in module.named_modules():
        rewriter = installed(child) if path and not any(path.startswith(f"{other}.") for other in paths) else None
        if isinstance(rewriter, Rewriter) and rewriter.latest is not None and rewriter.latest.function is not None:
            paths.append(path)
    return f" but for {first_names(paths)}, which memopt rewrites" if paths else ""


def _key(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Signature:
    leaves, spec = flattened((args, kwargs))
    device = next((leaf.device.type for leaf in leaves if isinstance(leaf, torch.Tensor)), "cpu")
    # Replicas of nn.DataParallel differ from their original in bookkeeping alone, but live on other devices.
    return (input_signature(leaves), spec, mode_signature(device), module_signature(module))


def callers_level() -> int:
    """For a warning: how far above the caller of this the frame is that is neither memopt's nor torch's."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_THE_USERS):
        frame, level = frame.f_back, level + 1
    return level


def _under_another_tool() -> bool:
    """Tools that must see the user's own forward: our recorder, torch.jit.trace, functorch, forward-mode
    differentiation, global module hooks."""
    hooks = torch.nn.modules.module
    return (
        is_recording()
        or torch._C._is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or bool(hooks._global_forward_hooks or hooks._global_forward_pre_hooks)
        or bool(hooks._global_backward_hooks or hooks._global_backward_pre_hooks)
    )

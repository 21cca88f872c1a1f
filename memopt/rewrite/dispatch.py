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
from torch import distributed, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.nn.parameter import is_lazy
from torch.overrides import _get_current_function_mode_stack
from torch.utils import _pytree as pytree

from memopt.capture import Place, is_recording, outside_places, outside_signature, values_read
from memopt.errors import CaptureError
from memopt.ir import Explanation, first_names, flattened, handed_on, is_carrier, without_carriers
from memopt.rewrite.install import installed
from memopt.rewrite.signature import Signature, input_signature, mode_signature, module_signature, with_lists

Plain = Callable[..., Any]

_FOLDERS = *torch.__path__, os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_NOT_THE_USERS = *(folder + os.sep for folder in _FOLDERS), "<eval_with_key>"
"""How file names begin whose frames are not the user's: torch, this package, generated forwards."""

CACHED_FORWARDS = 32
"""Rewritten forwards kept for one module. The least recently used one goes first."""
RECORDINGS = 16
"""After so many, more than half of them new, the user is told."""


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
        self._recorded = self._reused = 0
        self._known: tuple[Signature, dict[str, Any]] | None = None
        self._outside: list[Place] | None = None
        self.latest: RewrittenForward | None = None
        self.ran = False
        self.why_not: str | None = None

    def run(self, module: nn.Module, plain: Plain, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The rewritten forward where gradients are recorded and it can run; else the module's own."""
        if not torch.is_grad_enabled() or _under_another_tool() or self._gave_up():
            return plain(module, *args, **kwargs)
        leaves, spec = flattened((args, kwargs))
        carriers = [leaf for leaf in leaves if is_carrier(leaf)]
        given = args, kwargs
        if carriers:
            leaves = without_carriers(leaves)
            given = pytree.tree_unflatten(leaves, spec)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if not tensors or not all(map(_is_ordinary, tensors)):
            self._tell_of_classes(module, tensors)
            return plain(module, *args, **kwargs)
        try:
            rewritten = self.prepare(module, plain, *given)
        except CaptureError as error:
            refusal = str(error)
            if any(map(is_lazy, module.parameters())):  # this forward makes them
                return plain(module, *args, **kwargs)
        else:
            if rewritten.function is None or rewritten.output_spec is None:
                return plain(module, *args, **kwargs)
            self.ran = True
            results = rewritten.function(module, *tensors)
            if carriers:
                results = tuple(handed_on(result, carriers) for result in results)
            return pytree.tree_unflatten(results, rewritten.output_spec)
        self._descend(module)
        key = self._key(module, *given)
        result = plain(module, *args, **kwargs)  # where this raises too, the fault is not the recording's
        self._leave_alone(module, key, refusal)
        return result

    def _tell_of_classes(self, module: nn.Module, tensors: list[torch.Tensor]) -> None:
        """Operations of another class of tensors may be its own, of which a recording would see nothing."""
        others = {type(tensor) for tensor in tensors} - {torch.Tensor, nn.Parameter, FakeTensor}
        names = sorted(kind.__name__ for kind in others if kind.__module__.partition(".")[0] != "torch")
        if names and self.why_not is None:
            self.why_not = (
                f"memopt left {type(module).__name__} as it is: its input is a {names[0]}, whose operations may be its "
                "own. Hand in x.as_subclass(torch.Tensor)."
            )
            warnings.warn(self.why_not, stacklevel=callers_level())

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
            try:
                found = self._cache.get(key)
            except TypeError:  # a list where others of its class have a number
                with_lists(module)
                key = self._key(module, args, kwargs)
                found = self._cache.get(key)
            self._reused += found is not None
            if found is None:
                self._count_recording(module, key)
                found = self._build(module, plain, args, kwargs)
                self._outside = outside_places(module)  # modules may have been replaced by others
                self._remember(self._key(module, args, kwargs), found)  # boundaries have got a class of their own
            self._remember(key, found)
        return found

    def _count_recording(self, module: nn.Module, key: Signature) -> None:
        """Say so where nearly every call is recorded anew, which takes longer than a step."""
        self._recorded += 1
        if self._recorded > self._reused and self._recorded in (RECORDINGS - 1, RECORDINGS):
            known, self._known = self._known, (key, values_read(module))
            if self._recorded == RECORDINGS and known is not None:
                warnings.warn(
                    f"memopt has recorded the forward of {type(module).__name__} {RECORDINGS} times in "
                    f"{RECORDINGS + self._reused} calls, which takes longer than a step: "
                    f"{_what_changes(*known, *self._known)}",
                    stacklevel=callers_level(),
                )

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


def _is_ordinary(tensor: torch.Tensor) -> bool:
    """Whether an input is a tensor and nothing more: of no other class, without attributes of the user's, not empty.

    Of several processes one may have nothing to do, and yet take part in what the others wait for.
    """
    if type(tensor) is FakeTensor:
        return True
    if type(tensor) not in (torch.Tensor, nn.Parameter):
        return False
    if not tensor.numel() and not (distributed.is_available() and distributed.is_initialized()):
        return False
    return all(name.startswith("_") for name in tensor.__dict__)


def _but_for(module: nn.Module) -> str:
    """The largest submodules that are rewritten instead, where there are any."""
    paths: list[str] = []
    for path, child in module.named_modules():
        rewriter = installed(child) if path and not any(path.startswith(f"{other}.") for other in paths) else None
        if isinstance(rewriter, Rewriter) and rewriter.latest is not None and rewriter.latest.function is not None:
            paths.append(path)
    return f" but for {first_names(paths)}, which memopt rewrites" if paths else ""


def _what_changes(before: Signature, known: dict[str, Any], after: Signature, now: dict[str, Any]) -> str:
    """Between two calls that were recorded one after the other."""
    names = sorted(name for name, value in now.items() if known.get(name) != value)
    if names:
        return f"{first_names(names)} changed in between. Keep what changes at every step outside of the model."
    if before[:2] != after[:2]:
        return "its inputs differ, in shape or in values that are no tensors. Use few sizes, and tensors for the rest."
    return "its modules or the modes of torch differ."


def _key(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Signature:
    leaves, spec = flattened((args, kwargs))
    device = next((leaf.device.type for leaf in leaves if isinstance(leaf, torch.Tensor)), "cpu")
    # Replicas of nn.DataParallel differ from their original in bookkeeping alone, but live on other devices.
    return (input_signature(leaves), spec, mode_signature(device), module_signature(module))


def _replaces_functions() -> bool:
    """Whether the user has a mode in force that sees every function of torch's."""
    if not torch._C._len_torch_function_stack():
        return False
    modes: list[Any] = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    return any(type(mode).__module__.partition(".")[0] not in ("torch", "memopt") for mode in modes)


def callers_level() -> int:
    """For a warning: how far above the caller of this the frame is that is neither memopt's nor torch's."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_THE_USERS):
        frame, level = frame.f_back, level + 1
    return level


def _under_another_tool() -> bool:
    """Tools that must see the user's own forward: our recorder, torch.jit.trace, functorch, forward-mode
    differentiation, global module hooks, what replaces functions of torch's."""
    hooks = torch.nn.modules.module
    return (
        is_recording()
        or torch._C._is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or _replaces_functions()
        or bool(hooks._global_forward_hooks or hooks._global_forward_pre_hooks)
        or bool(hooks._global_backward_hooks or hooks._global_backward_pre_hooks)
    )

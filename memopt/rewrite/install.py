"""Swap in a generated subclass whose training forward is the rewritten one; take it out again.

A bound method as instance attribute would not follow the module that it is called on (`nn.DataParallel` replicas
would use the original's weights), so the class of the instance is replaced, as FSDP2 does. What memopt knows of the
instance lives on that class: nothing enters the instance's `__dict__`, and replicas find it through their type.
"""

import copy
import copyreg
import functools
from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
from torch import nn

from memopt.ir import is_fully_sharded


class Dispatcher(Protocol):
    """Decides at every call which forward runs."""

    def run(self, module: nn.Module, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the rewritten forward of `module`, or `plain(module, *args, **kwargs)`."""
        ...


_MARK = "_memopt_dispatcher"


def installed(module: nn.Module) -> Dispatcher | None:
    """The dispatcher in force on a module, if any."""
    return cast("Dispatcher | None", getattr(type(module), _MARK, None))


def install(module: nn.Module, dispatcher: Dispatcher, reapply: Callable[[nn.Module], nn.Module]) -> None:
    """Make `dispatcher` decide about the forward of `module`; `reapply` is called on deep copies of it."""
    current = type(module)
    if is_fully_sharded(module) and len(current.__bases__) > 1:  # FSDP2's class stays on top, as if it had come later
        sharded, *bases = current.__bases__
        module.__class__ = _with_bases(current, (sharded, *(_subclass(base, dispatcher, reapply) for base in bases)))
    else:
        module.__class__ = _subclass(current, dispatcher, reapply)


def uninstall(module: nn.Module) -> None:
    """Take our class out of the module's current bases, which others may have extended since."""
    current = type(module)
    if _MARK in vars(current):
        module.__class__ = current.__bases__[0]
        return
    module.__class__ = _with_bases(current, tuple(b.__bases__[0] if _MARK in vars(b) else b for b in current.__bases__))


def own_forward(module: nn.Module) -> Callable[..., Any]:
    """The forward of the user's class, beneath ours."""
    ours: Any = next(c for c in type(module).__mro__ if _MARK in vars(c))
    forward: Callable[..., Any] = ours.__bases__[0].forward
    return forward


def _with_bases(current: type[nn.Module], bases: tuple[type, ...]) -> type[nn.Module]:
    namespace = {k: v for k, v in vars(current).items() if k not in ("__dict__", "__weakref__")}
    return cast("type[nn.Module]", type(current.__name__, bases, namespace))


def _subclass(
    base: type[nn.Module], dispatcher: Dispatcher, reapply: Callable[[nn.Module], nn.Module]
) -> type[nn.Module]:
    plain = base.forward
    # Dynamo must not look inside: its partitioner would save the concats again and undo the saving.
    run = torch.compiler.disable(dispatcher.run)  # type: ignore[no-untyped-call]

    @functools.wraps(plain)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # Not `is_exporting()`, which Dynamo of torch 2.11 takes for true in torch.compile, too.
        if torch.compiler._is_exporting_flag:
            return plain(self, *args, **kwargs)
        return run(self, plain, args, kwargs)

    def reduce_ex(self: nn.Module, protocol: Any) -> Any:
        """Pickles name the user's class: they load where memopt is absent."""
        reduced = base.__reduce_ex__(self, protocol)
        if isinstance(reduced, str):
            return reduced
        function, arguments, *rest = reduced
        if function is copyreg.__newobj__:  # type: ignore[attr-defined]  # pickle insists that this one makes the object's own class
            function, arguments = object.__new__, arguments[:1]
        return (function, tuple(base if a is subclass else a for a in arguments), *rest)

    def deep_copy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
        function, arguments, *rest = reduce_ex(self, 4)
        duplicate: nn.Module = function(*arguments)
        memo[id(self)] = duplicate
        state = copy.deepcopy(rest[0] if rest else None, memo)
        if hasattr(duplicate, "__setstate__"):
            duplicate.__setstate__(state)  # type: ignore[no-untyped-call]
        return reapply(duplicate)

    def prepare_scriptable(self: nn.Module) -> nn.Module:
        """torch.jit.script compiles the user's own forward."""
        duplicate = base.__new__(base)
        duplicate.__dict__ = self.__dict__
        return duplicate

    namespace = {
        "forward": forward,
        "__reduce_ex__": reduce_ex,
        "__deepcopy__": deep_copy,
        "__prepare_scriptable__": prepare_scriptable,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        _MARK: dispatcher,
    }
    subclass = cast("type[nn.Module]", _metaclass(type(base))(base.__name__, (base,), namespace))
    return subclass


_metaclasses: dict[Any, Any] = {}


def _metaclass(of_users_class: Any) -> Any:
    """What forward writes to its class (`type(self).steps += 1`) must arrive at the user's class."""
    if of_users_class not in _metaclasses:
        _metaclasses[of_users_class] = _make_metaclass(of_users_class)
    return _metaclasses[of_users_class]


def _make_metaclass(of_users_class: Any) -> Any:

    set_own: Any = of_users_class.__setattr__

    def set_attribute(cls: Any, name: str, value: Any) -> None:
        if _MARK in vars(cls):
            setattr(cls.__bases__[0], name, value)
        else:
            set_own(cls, name, value)

    return type(of_users_class.__name__, (of_users_class,), {"__setattr__": set_attribute})

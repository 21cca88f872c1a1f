"""Run forward on fake tensors and write every call into torch down as an fx node."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from memopt.capture.calls import call_of, has_tensor, is_mutation, overwritten, tensors_in, versions
from memopt.capture.contexts import (
    context,
    enter_autocast,
    exit_autocast,
    refuse_switch,
    same_context_after,
    set_gradients,
    without_backward,
)
from memopt.capture.fake_state import fake_of, fake_state
from memopt.capture.frozen import frozen
from memopt.capture.hooked import STRAY, WHOLE_LATER, call_as_hooked, refuse_closed
from memopt.capture.interception import inside_leaf, quiet_torch, recording
from memopt.capture.leaves import is_leaf, is_torchs, settings, without_batch_counter
from memopt.capture.side_effects import refusing_side_effects, require_unchanged
from memopt.capture.source import user_line, with_sources
from memopt.capture.watcher import Watcher, reads_once
from memopt.errors import CaptureError
from memopt.ir import PLAIN, TAKES_PART, flattened, has_hooks, holds_tensor, is_in_pieces, parts_of


@dataclass(frozen=True, slots=True)
class Captured:
    """A recorded forward.

    Attributes:
        graph: one placeholder per tensor among the flattened inputs, one node per call into torch. `meta["val"]` of
            a node is its fake result, `meta["source"]` the user's "file:line", `meta["hooked"]` of a module call
            whether hooks, which were not run, may return something else, `meta["boundary"]` whether it is a container
            of the user's, `meta["overwrites"]` its inputs that it changes; `meta["random"]`, `meta["writes"]` and
            `meta["reads_once"]` are what a `Watcher` saw.
        output_spec: how to rebuild what forward returned from the graph's flat outputs.
        order: the nodes as recorded, also after the graph was changed.
        switches_context: forward has blocks of `no_grad` or `autocast`.
    """

    graph: fx.Graph
    output_spec: pytree.TreeSpec
    order: tuple[fx.Node, ...]
    switches_context: bool = False


def capture(root: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Captured:
    """Record `forward(*args, **kwargs)` of `root`; no arithmetic is done and no state of the user changes.

    Args:
        root: the module that `forward` belongs to.
        forward: the bound forward to run.
        args, kwargs: its inputs. Tensors become placeholders; anything else is part of the recording.

    Raises:
        CaptureError: forward cannot be written as a graph; the message says why and where.
    """
    leaves, spec = flattened((args, kwargs))
    outer_mode = detect_fake_mode(leaves)
    mode = outer_mode or FakeTensorMode()
    recorder = _Recorder(root)
    with (
        quiet_torch(),
        with_sources(),
        same_context_after(),
        # What a recording runs is no step of the user's: nothing that counts operators or memory may see it.
        _disable_current_modes(),
        refusing_side_effects(root, leaves),
        fake_state(root, mode, leaves) as names,
        recording(recorder),
    ):
        recorder.state_names = names
        leaves_before = [frozen(leaf) for leaf in leaves]
        fakes = [recorder.placeholder(leaf, mode) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        fake_args, fake_kwargs = pytree.tree_unflatten(fakes, spec)
        try:
            with (
                mode,
                recorder.watcher,
                recorder,
                without_backward(),
            ):
                result = forward(*fake_args, **fake_kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise CaptureError(
                f"{recorder.last_source}: forward needs the value of a tensor, as .item(), print or a branch on it "
                f"do ({error}). Move that out of forward."
            ) from error
        except CaptureError:
            raise
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            raise CaptureError(
                f"{recorder.last_source or type(root).__name__}: forward fails on tensors without data ({what}). "
                "Check the shapes and dtypes of the inputs."
            ) from error
        require_unchanged(root, (fakes, spec), (fake_args, fake_kwargs), leaves_before == [frozen(x) for x in leaves])
        flat, output_spec = flattened(result)
        recorder.output(flat)
    if outer_mode is not None:  # parameters of a predicted step were cast, unseen: it shall cast them itself
        torch.clear_autocast_cache()
    graph = recorder.finish()
    return Captured(graph, output_spec, tuple(graph.nodes), recorder.switches_context)


class _Recorder(TorchFunctionMode):
    """Sees every torch function called on the way and appends it to the graph."""

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.state_names: dict[int, str] = {}
        self.paths = {id(module): path for path, module in root.named_modules()}
        self.root = root
        self.module_stack: list[str] = [""]
        self.last_source = ""
        self._nodes: dict[int, fx.Node] = {}
        self._without_gradient: set[int] = set()  # made under no_grad
        self.watcher = Watcher()
        self._blocks: list[fx.Node] = []
        self.switches_context = False
        self._alive: list[torch.Tensor] = []  # an id is only a name while its tensor lives
        self._context = context()
        self._settings = {id(module): frozen(settings(module)) for module in root.modules() if is_leaf(module)}
        self._in_pieces = {name for name, parameter in root.named_parameters() if is_in_pieces(parameter)}

    def placeholder(self, tensor: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
        fake = fake_of(tensor, mode)
        if not tensor.is_leaf and fake.is_leaf:  # what another module made may be overwritten, a leaf may not
            with mode:
                fake = fake.clone()
        node = self.graph.placeholder(f"input_{len(self._nodes)}")
        self._bind(fake, node)
        return fake

    def output(self, flat: list[Any]) -> None:
        self._follow_context()
        self.graph.output(tuple(self._argument(leaf) for leaf in flat))

    def finish(self) -> fx.Graph:
        """The graph without the parts of tuples and the state that nobody read."""
        for node in reversed(self.graph.nodes):
            if not node.users and (node.op == "get_attr" or node.target in TAKES_PART):
                self.graph.erase_node(node)
        return self.graph

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in ("__repr__", "__format__"):
            raise CaptureError(f"{user_line()}: forward prints a tensor or makes text of it. Do that outside.")
        if name != "__get__":
            self._refuse_strays((args, kwargs))
        result = func(*args, **kwargs)
        if name == "__get__":
            if isinstance(result, torch.Tensor):
                self._record("call_function", getattr, (args[0], func.__self__.__name__), {}, result)
        elif name == "__set__":
            raise CaptureError(f"{user_line()}: forward assigns to a tensor's attribute. Move it out of forward.")
        elif has_tensor(result) or is_mutation(name, kwargs):
            op, target = call_of(func, name)
            self._record(op, target, args, kwargs, result)
        return result

    def _refuse_strays(self, arguments: Any) -> None:
        """Before a call, which could write to them: tensors from elsewhere are no part of the recording."""
        if not all(isinstance(tensor, FakeTensor) for tensor in tensors_in(arguments)):
            self.last_source = user_line()
            raise CaptureError(STRAY.format(self.last_source or "forward"))

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A module that forward calls: looked into if it is the user's own."""
        if type(module) is nn.Sequential and not has_hooks(module):
            return module.forward(*args, **kwargs)  # type: ignore[no-untyped-call]  # a slice of one is a new one
        if id(module) not in self.paths:
            raise CaptureError(f"{user_line()}: calls a {type(module).__name__} that is no submodule of the model.")
        if type(module) is nn.Identity and not has_hooks(module):
            return module.forward(*args, **kwargs)  # nothing happens: a chain goes on behind it
        if is_leaf(module):
            return self._call_leaf(module, args, kwargs)
        self.module_stack.append(self.paths[id(module)])
        try:
            return module.forward(*args, **kwargs)
        finally:
            self.module_stack.pop()

    def _call_leaf(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A module that is not looked into: one `call_module` node."""
        path = self.paths[id(module)]
        if frozen(settings(module)) != self._settings.get(id(module)):
            raise CaptureError(f"{user_line()}: forward changes a setting of {path} and calls it. Set it before.")
        if not has_hooks(module) and any(name.rpartition(".")[0] == path for name in self._in_pieces):
            raise CaptureError(WHOLE_LATER.format(path))
        before = versions((args, kwargs))
        with inside_leaf(), torch._C.DisableTorchFunction(), without_batch_counter(module):
            result = call_as_hooked(module, args, kwargs)
        refuse_closed(result, path)
        node = self._record("call_module", path, args, kwargs, result)
        node.meta["hooked"] = has_hooks(module)
        node.meta["boundary"] = not is_torchs(module)
        node.meta["overwrites"] = overwritten(node, before)
        return result

    def _record(self, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> fx.Node:
        self.last_source = user_line()
        self._follow_context()
        node = self.graph.create_node(op, target, self._arguments(args), self._arguments(kwargs))
        node.meta["source"] = self.last_source
        node.meta["random"], node.meta["writes"] = self.watcher.take()
        node.meta["reads_once"] = reads_once(result, (args, kwargs))
        node.meta["autocast"] = any(self._context[2:4])
        node.meta["module"] = self.module_stack[-1]
        self._bind(result, node)
        return node

    def custom(self, function: Any, apply: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The call of a `torch.autograd.Function`: its backward is its own, so it is not looked into."""
        self._refuse_strays((args, kwargs))
        with inside_leaf(), torch._C.DisableTorchFunction():
            result = apply(*args, **kwargs)

        def custom_function(*given: Any, **named: Any) -> Any:
            return function.apply(*given, **named)

        self._record("call_function", custom_function, args, kwargs, result)
        return result

    def enter_autocast(self, block: torch.autocast) -> None:
        """A block that begins inside forward."""
        settings = (block.device, block.fast_dtype, block._enabled, block._cache_enabled)
        self._follow_gradients()
        self._blocks.append(self._context_node(enter_autocast, settings))
        self._context = context()

    def exit_autocast(self) -> None:
        """The end of the block that began last."""
        self._follow_gradients()
        self._context_node(exit_autocast, (self._blocks.pop(),))
        self._context = context()

    def _follow_gradients(self) -> None:
        """Switch gradients on or off in the graph where forward did."""
        enabled, *_ = context()
        if enabled != self._context[0]:
            self._context_node(set_gradients, (enabled,))
            self._context = (enabled, *self._context[1:])

    def _follow_context(self) -> None:
        self._follow_gradients()
        refuse_switch(self._context, self.last_source)

    def _context_node(self, function: Callable[..., Any], args: tuple[Any, ...]) -> fx.Node:
        self.switches_context = True
        return self.graph.call_function(function, args)

    def _bind(self, result: Any, node: fx.Node) -> None:
        node.meta["val"] = result
        if isinstance(result, torch.Tensor):
            self._nodes[id(result)] = node
            if not result.requires_grad and not torch.is_grad_enabled():
                self._without_gradient.add(id(result))
            else:
                self._without_gradient.discard(id(result))
            self._alive.append(result)
        else:
            for take, key, part in parts_of(result):
                self._bind(part, self.graph.call_function(take, (node, key)))

    def _arguments(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self._arguments(item) for key, item in value.items()}
        if isinstance(value, tuple) and not hasattr(value, "_fields") and not isinstance(value, torch.Size):
            return tuple(self._arguments(item) for item in value)
        if isinstance(value, list):
            return [self._arguments(item) for item in value]
        if isinstance(value, torch.Size):
            return tuple(value)
        return self._argument(value)

    def _argument(self, value: Any) -> Any:
        if isinstance(value, PLAIN):
            return value
        if not isinstance(value, torch.Tensor):
            if holds_tensor(value):
                raise CaptureError(f"{self.last_source}: a tensor inside a {type(value).__name__} cannot be recorded.")
            return value
        node = self._nodes.get(id(value))
        if node is not None and value.requires_grad and id(value) in self._without_gradient:
            raise CaptureError(
                f"{self.last_source}: a tensor made without gradients has one. Call custom autograd functions as "
                "Function.apply(...)."
            )
        if node is None:
            name = self.state_names.get(id(value))
            if name is None:
                raise CaptureError(STRAY.format(self.last_source or "forward"))
            if name in self._in_pieces:
                raise CaptureError(WHOLE_LATER.format(name))
            node = self.graph.create_node("get_attr", name)
            self._bind(value, node)
        return node

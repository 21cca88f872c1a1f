"""Put regions into a recorded graph and turn the graph into a function of the live module."""

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_aggregate

from memopt.capture import Captured, restoring_context
from memopt.errors import CaptureError, MemoptError
from memopt.find import Found
from memopt.ir import FusedPlan, RegionPlan
from memopt.rewrite.live import look_up_at_once
from memopt.rewrite.regions import Group
from memopt.runtime import fused_callable, region_callable

Forward = Callable[..., tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class Region:
    """A group of nodes with the plan by which it runs, and what that is called where its moments are told."""

    group: Group
    plan: RegionPlan | FusedPlan
    label: str


@dataclass(frozen=True, slots=True)
class Spliced:
    """The rewritten forward: `function(module, *input_tensors)` returns the flat outputs."""

    function: Forward


def splice(captured: Captured, found: Found, regions: list[Region]) -> Spliced:
    """Replace each region's nodes by one call, and generate the new forward.

    Raises:
        MemoptError: the new graph is not valid (a bug in memopt, never silently run).
    """
    graph = captured.graph
    for index, region in reversed(list(enumerate(regions))):  # so that later regions' inputs are still in place
        _replace(graph, found, region, f"memopt_region_{index}")
    _guard_hooked(graph)
    try:
        graph.lint()
    except RuntimeError as error:
        raise MemoptError(f"memopt built an invalid graph ({error}). Please report this model.") from error
    spliced = _generate(graph)
    return replace(spliced, function=restoring_context(spliced.function)) if captured.switches_context else spliced


def _replace(graph: fx.Graph, found: Found, region: Region, name: str) -> None:
    group = region.group
    for node in group.moved:
        for source in node.all_input_nodes:
            if source.op == "get_attr":
                group.nodes[0].prepend(source)
        group.nodes[0].prepend(node)
    with graph.inserting_before(group.nodes[0]):
        operands = tuple(() if n in found.concats else _operands(graph, n, found) for n in group.nodes)
        call = graph.call_function(_callable(region, name), (group.inputs, operands))
        call.meta["source"] = group.nodes[0].meta.get("source", "")
        results = [
            graph.call_function(operator.getitem, (call, index))
            for index in range(len(group.outputs) + len(group.passed_through))
        ]
    inside = set(group.nodes)
    for node, result in zip(group.outputs, results, strict=False):
        node.replace_all_uses_with(result, delete_user_cb=lambda user: user not in inside)
    last = found.effects.position[group.nodes[-1]]
    for node, result in zip(group.passed_through, results[len(group.outputs) :], strict=True):
        node.replace_all_uses_with(
            result, delete_user_cb=lambda user: user is not call and _is_later(user, last, found)
        )
    for node in reversed(group.nodes):
        graph.erase_node(node)


def _callable(region: Region, name: str) -> Callable[..., Any]:
    plan, label = region.plan, region.label
    return fused_callable(plan, name, label) if isinstance(plan, FusedPlan) else region_callable(plan, name, label)


def _is_later(user: fx.Node, last: int, found: Found) -> bool:
    """Whether a node runs after position `last`; calls of later regions have no position of their own."""
    return found.effects.position.get(user, last + 1) > last


def _guard_hooked(graph: fx.Graph) -> None:
    """Hooks are not run by the recording: check that what they make of a module's result is what was recorded."""
    for node in list(graph.nodes):
        if not node.meta.get("hooked"):
            continue
        for result in (node, *(user for user in node.users if user.target is operator.getitem)):
            if isinstance(result.meta["val"], torch.Tensor):
                with graph.inserting_after(result):
                    guard = graph.call_function(_guard(node, result.meta["val"]), (result,))
                result.replace_all_uses_with(guard, delete_user_cb=lambda user, guard=guard: user is not guard)


def _guard(node: fx.Node, recorded: torch.Tensor) -> Callable[[Any], Any]:
    shape, dtype, target = tuple(recorded.shape), recorded.dtype, node.target

    def as_recorded(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and tuple(value.shape) == shape and value.dtype == dtype:
            return value
        found = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise CaptureError(
            f"A hook on {target} returns {found} where its module returns {shape} {dtype}, by which the rest was "
            "recorded. Remove the hook, or apply memopt to submodules on either side of it."
        )

    return as_recorded


def _operands(graph: fx.Graph, node: fx.Node, found: Found) -> tuple[fx.Node, ...]:
    """What a step is bound to at every forward: the live module, or the tensors of a function call."""
    if node.op == "call_module":
        assert isinstance(node.target, str)
        return (graph.create_node("get_attr", node.target),)
    copies: list[fx.Node] = []
    for operand in found.operands(node):
        # State may first be read inside the region: read it again before it.
        copies.append(graph.node_copy(operand) if operand.op == "get_attr" else operand)
    return tuple(copies)


_SPELLABLE = frozenset(
    map(type, (None, True, 1, 1.0, 1j, "", b"", ..., torch.float32, torch.device("cpu"), torch.strided))
) | {torch.memory_format}


def _name_objects(graph: fx.Graph) -> None:
    """Objects that code cannot spell (a hook, a generator, a numpy number) become results of a function."""
    for node in graph.nodes:

        def name(value: Any, user: fx.Node = node) -> Any:
            if isinstance(value, fx.Node) or type(value) in _SPELLABLE:
                return value
            with graph.inserting_before(user):
                return graph.call_function(_constant(value))

        node.args, node.kwargs = map_aggregate(node.args, name), map_aggregate(node.kwargs, name)


def _constant(value: Any) -> Callable[[], Any]:
    def constant() -> Any:
        return value

    return constant


def _generate(graph: fx.Graph) -> Spliced:
    _name_objects(graph)
    find = look_up_at_once(graph)
    source = graph.python_code("self")
    namespace: dict[str, Any] = dict(source.globals)
    exec(compile(source.src, "<memopt rewritten forward>", "exec"), namespace)  # fx's own code generation
    generated = namespace["forward"]

    def forward(module: nn.Module, *tensors: torch.Tensor) -> tuple[Any, ...]:
        result: tuple[Any, ...] = generated(find(module), *tensors)
        return result

    return Spliced(forward)

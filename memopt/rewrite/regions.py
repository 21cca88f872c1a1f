"""Which chains run together as one region, and whether that is safe."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from memopt.find import Chain, Found, Rejected
from memopt.ir import Extent, Kind, Level, OpSpec, RegionDraft, Role, Step
from memopt.rewrite.runs import Run
from memopt.runtime.memory_format import suggested_format


@dataclass(frozen=True, slots=True)
class Group:
    """A contiguous run of nodes to be run as one region.

    Attributes:
        nodes: members in eager's order, concats included.
        inputs: nodes outside that members read as features or inputs (not modules' parameters).
        passed_through: inputs that are read after the region as well.
        outputs: members that are read outside.
        chains: the chains inside.
        moved: nodes between members that do not depend on them; they run before the region.
    """

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    passed_through: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    chains: tuple[Chain, ...]
    moved: tuple[fx.Node, ...]


def group_chains(graph: fx.Graph, found: Found) -> tuple[list[Group], list[Rejected]]:
    """Merge chains that follow one another into regions; chains that cannot safely run in one are rejected."""
    chains = list(found.chains)
    rejected: list[Rejected] = []
    while True:
        groups = [_describe(run, chains, found) for run in _runs(graph, chains, found)]
        refused = [(group, refusal) for group in groups if (refusal := _unsafe(group, found)) is not None]
        if not refused:
            return groups, rejected
        for group, (value, reason) in refused:
            culprits = [chain for chain in group.chains if value in _touched(chain, found)] or group.chains
            rejected += [Rejected(c.anchor, c.norm, c.block, reason) for c in culprits]
        dropped = {entry.norm for entry in rejected}
        chains = [chain for chain in chains if chain.norm not in dropped]


def _touched(chain: Chain, found: Found) -> set[fx.Node]:
    """Every value that a chain computes or reads, through nested concats too."""
    touched = set(chain.nodes)
    todo = list(chain.nodes)
    while todo:
        new = [source for source in found.sources(todo.pop()) if source not in touched]
        touched.update(new)
        todo += [source for source in new if source in found.concats]
    return touched


def _runs(graph: fx.Graph, chains: list[Chain], found: Found) -> list[Run]:
    """Maximal contiguous runs of chain nodes. A chain that leaves its block ends its run: blocks stay apart.

    So does a value whose gradient somebody may look at. Its readers, at most one a run, then find it outside of
    their region, so that autograd itself adds up its gradient, as in eager.
    """
    members = {node for chain in chains for node in chain.nodes}
    todo = [node for node in members if node in found.concats]
    while todo:  # a concat that is only a part of another belongs to the run as well
        for part in found.concats[todo.pop()]:
            if part in found.concats and part not in members:
                members.add(part)
                todo.append(part)
    ends = {chain.nodes[-1] for chain in chains if chain.role == "exit"} | found.effects.observed
    runs = [Run(found)]
    for node in graph.nodes:
        if node in members:
            watched = found.effects.observed.intersection(found.sources(node))
            if watched & runs[-1].watched:
                runs.append(Run(found))
            runs[-1].watched |= watched
            runs[-1].nodes.append(node)
        if node in ends or (node not in members and node.op != "get_attr" and not runs[-1].step_over(node)):
            runs.append(Run(found))
    norms = {chain.norm for chain in chains}
    return [run for run in runs if norms.intersection(run.nodes)]


def _describe(run: Run, chains: list[Chain], found: Found) -> Group:
    nodes = run.nodes
    inside = set(nodes)
    inputs = list(dict.fromkeys(source for node in nodes for source in found.sources(node) if source not in inside))
    last = found.effects.position[nodes[-1]]

    def read_later(node: fx.Node) -> bool:
        return any(found.effects.position[user] > last for user in node.users)

    outputs = [node for node in nodes if any(user not in inside for user in node.users)]
    passed = [node for node in inputs if read_later(node) and _reads_inside(node, nodes, found) > 1]
    held = [chain for chain in chains if chain.norm in inside]
    return Group(tuple(nodes), tuple(inputs), tuple(passed), tuple(outputs), tuple(held), tuple(run.moved))


def _reads_inside(value: fx.Node, nodes: list[fx.Node], found: Found) -> int:
    return sum(source is value for node in nodes for source in found.sources(node))


def _unsafe(group: Group, found: Found) -> tuple[fx.Node, str] | None:
    """The value because of which a region must not be rewritten, and why, if there is one."""
    inside = set(group.nodes)
    if not any(node.meta["val"].requires_grad for node in group.nodes):
        return group.nodes[0], "no gradient flows through it"
    for node in group.nodes:
        for operand in found.operands(node):
            if operand in inside:
                return node, f"{node.name} takes a tensor computed in the block as a parameter"
    start = found.effects.position[group.nodes[0]]
    for value in (*group.inputs, *group.nodes):
        writer = found.effects.changed_after(value, start, inside)
        if writer is not None:
            because = f" ({found.reasons[writer]})" if writer in found.reasons else ""
            return value, f"{writer.name}{because} overwrites {value.name}, which must stay as it is until backward"
    for value in found.effects.observed.intersection(group.passed_through):
        return value, f"{value.name}, whose gradient can be observed, is several times in one concat"
    return None


def module_of(norm: fx.Node) -> str:
    """Dotted path of the module that a norm is, or that calls it as a function."""
    return str(norm.target) if norm.op == "call_module" else str(norm.meta.get("module", ""))


def draft_region(group: Group, found: Found, level_of: Callable[[str], Level]) -> RegionDraft:
    """Number the values of a group and describe its steps.

    Args:
        group: what runs as one region.
        found: everything found in its graph.
        level_of: the recompute level of a chain, by the dotted path of its norm's module.
    """
    levels = {node: level_of(module_of(chain.norm)) for chain in group.chains for node in chain.nodes}
    number: dict[fx.Node, int] = {node: index for index, node in enumerate(group.inputs)}
    leaves: dict[int, tuple[int, ...]] = {}
    steps: list[Step] = []
    for node in group.nodes:
        number[node] = len(number)
        sources = tuple(number[source] for source in found.sources(node))
        widths: tuple[int, ...] = ()
        spec = found.specs.get(node)
        if node in found.concats:
            spec = OpSpec(Kind.CONCAT, Role.CONCAT, from_module=False, writes_out=True)
            leaves[number[node]] = tuple(leaf for source in sources for leaf in leaves.get(source, (source,)))
            widths = tuple(_width(part) for part in found.concats[node])
        assert spec is not None
        flat = leaves.get(number[node], sources)
        in_place = spec.kind is Kind.RELU
        steps.append(Step(spec, sources, flat, widths, number[node], in_place, node.name, levels.get(node, "layer")))
    return RegionDraft(
        steps=tuple(steps),
        input_count=len(group.inputs),
        passed_through=tuple(number[node] for node in group.passed_through),
        outputs=tuple(number[node] for node in group.outputs),
        requires_grad=frozenset(number[n] for n in (*group.inputs, *group.nodes) if n.meta["val"].requires_grad),
        extents={number[node]: _extent(node.meta["val"]) for node in (*group.inputs, *group.nodes)},
    )


def _width(part: fx.Node) -> int:
    shape = part.meta["val"].shape
    return int(shape[1]) if len(shape) > 1 else 0


def _extent(value: torch.Tensor) -> Extent:
    channels_last = suggested_format(value) != torch.contiguous_format
    return Extent(tuple(value.shape), value.numel() * value.element_size(), value.dtype, channels_last)

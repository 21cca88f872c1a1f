"""Which chains run together as one region, and whether that is safe."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from memopt.find import Chain, Found, Rejected
from memopt.find.classify import operand_nodes
from memopt.ir import Extent, Kind, OpSpec, RegionDraft, Role, Step
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
    """

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    passed_through: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    chains: tuple[Chain, ...]


def group_chains(graph: fx.Graph, found: Found) -> tuple[list[Group], list[Rejected]]:
    """Merge chains that follow one another into regions; chains that cannot safely run in one are rejected."""
    chains = list(found.chains)
    rejected: list[Rejected] = []
    while True:
        groups = [_describe(nodes, chains, found) for nodes in _runs(graph, chains, found)]
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
        new = [source for source in _sources(todo.pop(), found) if source not in touched]
        touched.update(new)
        todo += [source for source in new if source in found.concats]
    return touched


def _runs(graph: fx.Graph, chains: list[Chain], found: Found) -> list[list[fx.Node]]:
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
    runs: list[list[fx.Node]] = [[]]
    seen: set[fx.Node] = set()
    for node in graph.nodes:
        if node in members:
            watched = found.effects.observed.intersection(_sources(node, found))
            if watched & seen:
                runs.append([])
                seen = set()
            seen |= watched
            runs[-1].append(node)
        if node in ends or (node not in members and node.op != "get_attr"):
            runs.append([])
            seen = set()
    norms = {chain.norm for chain in chains}
    return [run for run in runs if norms.intersection(run)]


def _describe(nodes: list[fx.Node], chains: list[Chain], found: Found) -> Group:
    inside = set(nodes)
    inputs = list(dict.fromkeys(source for node in nodes for source in _sources(node, found) if source not in inside))
    last = found.effects.position[nodes[-1]]

    def read_later(node: fx.Node) -> bool:
        return any(found.effects.position[user] > last for user in node.users)

    outputs = [node for node in nodes if any(user not in inside for user in node.users)]
    passed = [node for node in inputs if read_later(node) and _reads_inside(node, nodes, found) > 1]
    held = [chain for chain in chains if chain.norm in inside]
    return Group(tuple(nodes), tuple(inputs), tuple(passed), tuple(outputs), tuple(held))


def _reads_inside(value: fx.Node, nodes: list[fx.Node], found: Found) -> int:
    return sum(source is value for node in nodes for source in _sources(node, found))


def _sources(node: fx.Node, found: Found) -> Iterable[fx.Node]:
    if node in found.concats:
        return found.concats[node]
    first = node.args[0]
    assert isinstance(first, fx.Node)
    return (first,)


def _unsafe(group: Group, found: Found) -> tuple[fx.Node, str] | None:
    """The value because of which a region must not be rewritten, and why, if there is one."""
    inside = set(group.nodes)
    if not any(node.meta["val"].requires_grad for node in group.nodes):
        return group.nodes[0], "no gradient flows through it"
    for node in group.nodes:
        for operand in operand_nodes(node) if node not in found.concats else ():
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


def draft_region(group: Group, found: Found) -> RegionDraft:
    """Number the values of a group and describe its steps."""
    number: dict[fx.Node, int] = {node: index for index, node in enumerate(group.inputs)}
    leaves: dict[int, tuple[int, ...]] = {}
    steps: list[Step] = []
    for node in group.nodes:
        number[node] = len(number)
        sources = tuple(number[source] for source in _sources(node, found))
        widths: tuple[int, ...] = ()
        spec = found.specs.get(node)
        if node in found.concats:
            spec = OpSpec(Kind.CONCAT, Role.CONCAT, from_module=False, writes_out=True)
            leaves[number[node]] = tuple(leaf for source in sources for leaf in leaves.get(source, (source,)))
            widths = tuple(_width(part) for part in found.concats[node])
        assert spec is not None
        flat = leaves.get(number[node], sources)
        in_place = spec.kind is Kind.RELU
        steps.append(Step(spec, sources, flat, widths, number[node], in_place, node.name))
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

"""Chains: concat → norm → activation → convolution, up to the feature they produce, found on the dataflow.

Forms found: a norm that reads a concat along channels (a list, `*args`, pairwise growing, prepended, of one tensor),
or a norm that reads a tensor which is itself a part of such a concat (a block's first layer in the growing style).
From the norm the chain goes on through activation, convolution, dropout and further norms as long as each result has
one reader, to the tensor that joins the next concat, also through other operations that can be repeated (a gate, a
sum, a shuffle) behind the concat or before the next one; where it does not get there (a transition, the final norm), it
ends at its first convolution, or at the pooling behind it.
"""

from dataclasses import dataclass, replace
from math import prod
from typing import Literal

import networkx as nx
import torch
from torch import fx, nn

from memopt.find.classify import CONCAT_FUNCTIONS, classify, concat_parts, operand_nodes
from memopt.find.effects import Effects
from memopt.find.glue import glue_spec, hands_on_elements, input_nodes, state_nodes
from memopt.ir import Kind, OpSpec, Role

MOST_BETWEEN = 20
"""Operations that may stand between two parts of a chain."""


@dataclass(frozen=True, slots=True)
class Chain:
    """What was found; `nodes` in eager's order, the concat (if any) first.

    `role` is "layer" when the chain ends in a feature of a block, "exit" when it leaves the block.
    """

    anchor: fx.Node
    norm: fx.Node
    nodes: tuple[fx.Node, ...]
    role: Literal["layer", "exit"]
    block: int


@dataclass(frozen=True, slots=True)
class Rejected:
    """A chain that is left as it is, and why."""

    anchor: fx.Node
    norm: fx.Node
    block: int
    reason: str


@dataclass(frozen=True, slots=True)
class Found:
    """Everything found in one graph: chains, and for every other node how it would run (`specs`) or why it cannot."""

    chains: tuple[Chain, ...]
    rejected: tuple[Rejected, ...]
    specs: dict[fx.Node, OpSpec]
    reasons: dict[fx.Node, str]
    concats: dict[fx.Node, list[fx.Node]]
    effects: Effects

    def with_all_rejected(self, reason: str) -> "Found":
        """The same, every chain left as it is."""
        more = (Rejected(c.anchor, c.norm, c.block, reason) for c in self.chains)
        return replace(self, chains=(), rejected=(*self.rejected, *more))

    def sources(self, node: fx.Node) -> list[fx.Node]:
        """The values that a node of a region reads, once for each time: parts of a concat, inputs of a call."""
        if node in self.concats:
            return self.concats[node]
        if self.specs[node].kind is Kind.JOINT:
            return input_nodes(node)
        first = node.args[0]
        assert isinstance(first, fx.Node)
        return [first]

    def operands(self, node: fx.Node) -> list[fx.Node]:
        """The other tensors of its call: parameters and buffers, as a rule."""
        if node in self.concats:
            return []
        return state_nodes(node) if self.specs[node].kind is Kind.JOINT else operand_nodes(node)


def find_chains(graph: fx.Graph, root: nn.Module) -> Found:
    """Find every chain of a recorded graph, and the reason for every one that cannot be rewritten."""
    effects = Effects(graph, root)
    found = _Finder(graph, root, effects)
    chains: list[Chain] = []
    rejected: list[Rejected] = []
    for norm in found.norms:
        result = found.chain_from(norm)
        if isinstance(result, Chain):
            chains.append(result)
        elif result is not None:
            rejected.append(result)
    blocks = _dense_blocks(chains, rejected, found.concats)
    return Found(
        tuple(replace(chain, block=blocks.get(chain.anchor, 0)) for chain in chains),
        tuple(replace(entry, block=blocks.get(entry.anchor, 0)) for entry in rejected),
        found.specs,
        found.reasons,
        found.concats,
        effects,
    )


class _Finder:
    def __init__(self, graph: fx.Graph, root: nn.Module, effects: Effects) -> None:
        self.effects = effects
        self.root = root
        self.specs: dict[fx.Node, OpSpec] = {}
        self.reasons: dict[fx.Node, str] = {}
        self.concats: dict[fx.Node, list[fx.Node]] = {}
        self.other_concats: dict[fx.Node, str] = {}
        self.norms: list[fx.Node] = []
        for node in graph.nodes:
            self._sort(node, root)
        self.parts = {part for parts in self.concats.values() for part in parts}

    def _sort(self, node: fx.Node, root: nn.Module) -> None:
        if node.target in CONCAT_FUNCTIONS:
            parts = concat_parts(node)
            if isinstance(parts, list):
                self.concats[node] = parts
            elif parts is not None:
                self.other_concats[node] = parts
            return
        spec = classify(node, root)
        if isinstance(spec, OpSpec):
            if not self.effects.overwrites_unseen(node):
                self.reasons[node] = f"{node.name} overwrites a tensor that is read elsewhere"
            elif not isinstance(node.meta["val"], torch.Tensor):
                self.reasons[node] = f"{node.name} returns more than one tensor"
            else:
                self.specs[node] = spec
        elif spec is not None:
            self.reasons[node] = spec
        elif (glue := glue_spec(node, root)) is not None and not self.effects.writes_to(state_nodes(node)):
            self.specs[node] = glue
        if _looks_like_norm(node, spec, root):
            self.norms.append(node)

    def chain_from(self, norm: fx.Node) -> Chain | Rejected | None:
        """The chain through a norm, if the norm reads features."""
        source = norm.args[0] if norm.args else None
        if not isinstance(source, fx.Node):
            return None
        if source in self.other_concats:
            return Rejected(source, norm, 0, self.other_concats[source])
        before = [] if source in self.concats or source in self.parts else self._between(source)
        if before is None or (not before and source not in self.concats and source not in self.parts):
            return None
        heads = [node for node in (*before, source) if node in self.concats]
        anchor = heads[0] if heads else norm
        if norm not in self.specs:
            return Rejected(anchor, norm, 0, self.reasons.get(norm, "its norm is of an unknown kind"))
        role, tail = self._tail(norm)
        nodes = dict.fromkeys((*heads, *before, norm, *tail))
        return Chain(anchor, norm, tuple(sorted(nodes, key=self.effects.position.__getitem__)), role, 0)

    def _between(self, source: fx.Node) -> list[fx.Node] | None:
        """What stands between a norm and the concat before it (a gate, a shuffle), that concat included."""
        found: dict[fx.Node, None] = {}
        todo = [source]
        while todo and len(found) < MOST_BETWEEN:
            node = todo.pop()
            if node in found or (node not in self.concats and not self._may_stand_between(node)):
                continue
            found[node] = None
            todo += () if node in self.concats else self._inputs(node)
        return list(found) if self._leads_to_concat(source, found) else None

    def _leads_to_concat(self, source: fx.Node, found: dict[fx.Node, None]) -> bool:
        """Whether a concat's own elements arrive at a norm: past gates, but through no convolution or mean."""
        todo, seen = [source], {source}
        while todo:
            node = todo.pop()
            if node in self.concats:
                return True
            if node in found and hands_on_elements(node, self.specs[node], self.root):
                todo += [n for n in self._inputs(node) if n not in seen and n in found]
                seen.update(todo)
        return False

    def _ahead(self, start: fx.Node, norm: fx.Node) -> list[fx.Node] | None:
        """What stands between a chain's last operation and the next concat (a gate on the new feature, a sum)."""
        reached: dict[fx.Node, None] = {}
        todo = list(start.users)
        while todo and len(reached) < MOST_BETWEEN:
            node = todo.pop()
            if node not in reached and node not in self.concats and self._may_stand_between(node):
                reached[node] = None
                todo += () if node in self.parts else node.users
        features = [node for node in reached if self._is_feature(node, norm)]
        if not features:
            return None
        needed: dict[fx.Node, None] = {}
        todo = [min(features, key=self.effects.position.__getitem__)]
        while todo:
            node = todo.pop()
            if node in reached and node not in needed:
                needed[node] = None
                todo += self._inputs(node)
        return list(needed)

    def _inputs(self, node: fx.Node) -> list[fx.Node]:
        return [n for n in node.all_input_nodes if n.op != "get_attr"]

    def _may_stand_between(self, node: fx.Node) -> bool:
        return node in self.specs and self.specs[node].role is not Role.NORM

    def _tail(self, norm: fx.Node) -> tuple[Literal["layer", "exit"], list[fx.Node]]:
        """The nodes after the norm that belong to the chain."""
        tail: list[fx.Node] = []
        shortest: list[fx.Node] | None = None
        plain: list[fx.Node] | None = None  # as far as there is nothing but a chain's own operations
        current = norm
        while not self._is_feature(current, norm):
            following = self._only_reader(current)
            joined = [following] if following is not None else self._joined(current)
            if joined is None:
                break
            role = Role.GLUE if following is None else self.specs[following].role
            if role is Role.POOL:
                return "exit", [*tail, *joined] if shortest in (None, tail) else shortest
            plain = list(tail) if role is Role.GLUE and plain is None else plain
            tail += joined
            if role is Role.CONSUMER and shortest is None:
                shortest = list(tail)
            current = tail[-1]
        if self._is_feature(current, norm):
            return "layer", tail
        ahead = self._ahead(current, norm)
        if ahead is not None:
            return "layer", [*tail, *ahead]
        return "exit", shortest or (tail if plain is None else plain)

    def _is_feature(self, node: fx.Node, norm: fx.Node) -> bool:
        """Whether a value that a norm leads to joins a concat as an image, not as what a head has pooled to a point."""
        return node in self.parts and (_positions(node) > 1 or _positions(norm) == 1)

    def _joined(self, start: fx.Node) -> list[fx.Node] | None:
        """Operations that together make one tensor of another, as x · sigmoid(x) does; the one that makes it last."""
        joined: dict[fx.Node, None] = {}
        while len(joined) < MOST_BETWEEN:
            readers = {user for node in (start, *joined) for user in node.users} - joined.keys()
            if not readers:
                return None
            following = min(readers, key=self.effects.position.__getitem__)
            if following in self.concats or not self._may_stand_between(following):
                return None
            joined[following] = None
            if readers == {following}:
                return list(joined)
        return None

    def _only_reader(self, node: fx.Node) -> fx.Node | None:
        """The node that continues a chain: the one reader of `node`, run by one of our operations on it."""
        if len(node.users) != 1:
            return None
        (reader,) = node.users
        if reader not in self.specs or self.specs[reader].role is Role.GLUE:
            return None
        if reader.args[0] is not node or node in operand_nodes(reader):
            return None
        return reader


def _positions(node: fx.Node) -> int:
    """Pixels, voxels or samples of a value, of one example and channel."""
    return prod(node.meta["val"].shape[2:])


def _looks_like_norm(node: fx.Node, spec: OpSpec | str | None, root: nn.Module) -> bool:
    if isinstance(spec, OpSpec):
        return spec.role is Role.NORM
    if isinstance(spec, str) and node.op == "call_module":
        assert isinstance(node.target, str)
        module = root.get_submodule(node.target)
        return isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm))
    return False


def _dense_blocks(
    chains: list[Chain], rejected: list[Rejected], concats: dict[fx.Node, list[fx.Node]]
) -> dict[fx.Node, int]:
    """Number the dense blocks: chains that read a common feature belong to one."""
    network: nx.Graph[object] = nx.Graph()
    entries: list[Chain | Rejected] = [*chains, *rejected]
    for entry in entries:
        network.add_node(entry.anchor)
        if entry.anchor in concats:
            network.add_edges_from((entry.anchor, ("feature", part)) for part in concats[entry.anchor])
        elif isinstance(source := entry.norm.args[0], fx.Node):
            network.add_edge(entry.anchor, ("feature", source))
        if entry.anchor in concats:  # a nested concat is a feature of the next one
            network.add_edge(entry.anchor, ("feature", entry.anchor))
    block_of: dict[fx.Node, int] = {}
    components = [[n for n in group if isinstance(n, fx.Node)] for group in nx.connected_components(network)]
    order = {entry.anchor: index for index, entry in enumerate(entries)}
    for number, group in enumerate(sorted(components, key=lambda g: min(order[n] for n in g)), start=1):
        block_of.update(dict.fromkeys(group, number))
    return block_of

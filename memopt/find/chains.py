"""Chains: concat → norm → activation → convolution, up to the feature they produce, found on the dataflow.

Forms found: a norm that reads a concat along channels (a list, `*args`, pairwise growing, prepended, of one tensor),
or a norm that reads a tensor which is itself a part of such a concat (a block's first layer in the growing style).
From the norm the chain goes on through activation, convolution, dropout and further norms as long as each result has
one reader, to the tensor that joins the next concat; where it does not get there (a transition, the final norm), it
ends at its first convolution, or at the pooling behind it.
"""

from dataclasses import dataclass, replace
from typing import Literal

import networkx as nx
import torch
from torch import fx, nn

from memopt.find.classify import CONCAT_FUNCTIONS, classify, concat_parts, operand_nodes
from memopt.find.effects import Effects
from memopt.ir import OpSpec, Role


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
        if _looks_like_norm(node, spec, root):
            self.norms.append(node)

    def chain_from(self, norm: fx.Node) -> Chain | Rejected | None:
        """The chain through a norm, if the norm reads features."""
        source = norm.args[0] if norm.args else None
        if not isinstance(source, fx.Node):
            return None
        if source in self.other_concats:
            return Rejected(source, norm, 0, self.other_concats[source])
        if source not in self.concats and source not in self.parts:
            return None
        anchor = source if source in self.concats else norm
        if norm not in self.specs:
            return Rejected(anchor, norm, 0, self.reasons.get(norm, "its norm is of an unknown kind"))
        nodes = [source, norm] if source in self.concats else [norm]
        role, tail = self._tail(norm)
        return Chain(anchor, norm, (*nodes, *tail), role, 0)

    def _tail(self, norm: fx.Node) -> tuple[Literal["layer", "exit"], list[fx.Node]]:
        """The nodes after the norm that belong to the chain."""
        tail: list[fx.Node] = []
        shortest: list[fx.Node] | None = None
        current = norm
        while current not in self.parts and (following := self._only_reader(current)) is not None:
            role = self.specs[following].role
            if role is Role.POOL:
                ends_here = shortest is None or len(shortest) == len(tail)
                return "exit", [*tail, following] if ends_here or shortest is None else shortest
            tail.append(following)
            if role is Role.CONSUMER and shortest is None:
                shortest = list(tail)
            current = following
        if current in self.parts:
            return "layer", tail
        return "exit", tail if shortest is None else shortest

    def _only_reader(self, node: fx.Node) -> fx.Node | None:
        """The node that continues a chain: the one reader of `node`, run by one of our operations on it."""
        if len(node.users) != 1:
            return None
        (reader,) = node.users
        if reader not in self.specs or reader.args[0] is not node or node in operand_nodes(reader):
            return None
        return reader


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

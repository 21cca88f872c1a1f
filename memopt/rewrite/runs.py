"""Runs of nodes that follow one another, apart from some that can as well come before all of them."""

from dataclasses import dataclass, field

import torch
from torch import fx

from memopt.find import Found
from memopt.ir import Kind

_STATE = ("get_attr", "placeholder")
"""In graphs of Dynamo's, parameters and buffers are inputs."""


@dataclass(slots=True)
class Run:
    """Members of one region in eager's order.

    Attributes:
        found: everything found in the graph.
        nodes: the members.
        moved: nodes that were stepped over: a batch counter that a norm of the user's own advances, a weight that is
            masked before it is used.
        watched: values read so far whose gradient somebody may look at.
    """

    found: Found
    nodes: list[fx.Node] = field(default_factory=list)
    moved: list[fx.Node] = field(default_factory=list)
    watched: set[fx.Node] = field(default_factory=set)

    def step_over(self, node: fx.Node) -> bool:
        """Whether a node that is no member may run before the first member; then it is noted to be moved."""
        if not self.nodes:
            return False
        movable = (
            node.op in ("call_function", "call_method")
            and not node.meta.get("random", True)
            and isinstance(node.meta.get("val"), torch.Tensor)
            and not node.meta["autocast"]
            and all(self._is_there_before(source) for source in node.all_input_nodes)
            and self._writes_what_nobody_reads(node)
            and not any(self._is_members_state(source) for source in node.all_input_nodes)
        )
        if movable:
            self.moved.append(node)
        return movable

    def _is_there_before(self, source: fx.Node) -> bool:
        """State with one reader, or what is computed of it: its gradient has one term, whose order is no question."""
        if source.op not in _STATE and source not in self.moved:
            return False
        value = source.meta["val"]
        return len(source.users) == 1 or not value.requires_grad

    def _writes_what_nobody_reads(self, node: fx.Node) -> bool:
        writes = node.meta["writes"]
        if not writes:
            return True
        states = [source for source in node.all_input_nodes if source.op in _STATE]
        known = {source.meta["val"].untyped_storage()._cdata for source in states}
        return writes <= known and all(
            user is node or self._comes_later(user, node) for source in states for user in source.users
        )

    def _comes_later(self, user: fx.Node, node: fx.Node) -> bool:
        position = self.found.effects.position
        return position[user] > position[node]

    def _is_members_state(self, state: fx.Node) -> bool:
        """Whether a member reads, or as a norm writes, this parameter or buffer itself."""
        for member in self.nodes:
            if (
                state.op == "get_attr"
                and member.op == "call_module"
                and str(state.target).startswith(f"{member.target}.")
            ):
                return True
            if member in self.found.concats:
                continue
            writes = self.found.specs[member].kind in (Kind.BATCH_NORM, Kind.SYNC_BATCH_NORM)
            if writes and state in self.found.operands(member):
                return True
        return False

"""Is it safe? What a node overwrites, and who else could see it."""

import torch
from torch import fx, nn

_GRADIENT_OBSERVERS = frozenset({"register_hook", "retain_grad"})


class Effects:
    """Aliases and mutations of a recorded graph, read off the storages of its fake tensors."""

    def __init__(self, graph: fx.Graph, root: nn.Module) -> None:
        self.position = {node: index for index, node in enumerate(graph.nodes)}
        self._sharing: dict[int, list[fx.Node]] = {}
        for node in graph.nodes:
            storage = _storage_of(node)
            if storage is not None:
                self._sharing.setdefault(storage, []).append(node)
        self.mutations: dict[fx.Node, fx.Node] = {
            node: source for node in graph.nodes if (source := _overwritten(node, root)) is not None
        }
        self._writers: dict[int | None, list[fx.Node]] = {}
        inside = [(node, source) for node in graph.nodes for source in node.meta.get("overwrites", ())]
        for node, source in (*self.mutations.items(), *inside):
            self._writers.setdefault(_storage_of(source), []).append(node)
        self._written = {storage for node in graph.nodes for storage in node.meta.get("writes", ())}
        # Values whose own gradient can be looked at: those that forward returns, and those with a hook.
        self.observed = {source for node in graph.nodes if _observes(node) for source in node.all_input_nodes}

    def overwrites_unseen(self, node: fx.Node) -> bool:
        """Whether an in-place node changes a tensor that nothing else reads afterwards, under any name."""
        source = self.mutations.get(node)
        if source is None:
            return True
        storage = _storage_of(source)
        if storage is None:
            return False
        here = self.position[node]
        return all(
            alias is node or (alias.op not in ("placeholder", "get_attr") and self._last_use(alias) <= here)
            for alias in self._sharing[storage]
            if self.position[alias] <= here
        )

    def changed_after(self, value: fx.Node, start: int, members: set[fx.Node]) -> fx.Node | None:
        """The first node at or after position `start`, outside `members`, that overwrites the memory of `value`."""
        for node in self._writers.get(_storage_of(value), ()):
            if node not in members and self.position[node] >= start:
                return node
        return None

    def writes_to(self, state: list[fx.Node]) -> bool:
        """Whether forward writes to one of these parameters and buffers: backward could not read them again."""
        return not self._written.isdisjoint({_storage_of(node) for node in state})

    def _last_use(self, node: fx.Node) -> int:
        return max((self.position[user] for user in node.users), default=-1)


def _observes(node: fx.Node) -> bool:
    return node.op == "output" or (node.op == "call_method" and node.target in _GRADIENT_OBSERVERS)


def _storage_of(node: fx.Node) -> int | None:
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else None


def _overwritten(node: fx.Node, root: nn.Module) -> fx.Node | None:
    """The input that a node overwrites."""
    first = node.args[0] if node.args else None
    out = node.kwargs.get("out")
    if isinstance(out, fx.Node):
        return out
    if not isinstance(first, fx.Node):
        return None
    if node.op == "call_module":
        assert isinstance(node.target, str)
        return first if getattr(root.get_submodule(node.target), "inplace", False) else None
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    inplace_name = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
    # F.relu(x, True) and the like: the storage of the result tells.
    shares = node.op == "call_function" and (
        node.kwargs.get("inplace") is True or any(argument is True for argument in node.args[1:])
    )
    return first if inplace_name or (shares and _storage_of(node) == _storage_of(first)) else None

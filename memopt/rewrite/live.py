"""Looking up the live modules that a rewritten forward uses: all of them at once, at the beginning of a call.

Generated code would spell each as a chain of attributes, every link of it a function call in Python; a step has
thousands of links.
"""

from collections.abc import Callable
from typing import Any

from torch import fx, nn

_Tree = dict[str, Any]
_INDEX = ""
"""Key of a module's own number in its tree; no module is called so."""


class _Live:
    """Holds the modules of one call, as attributes `_0`, `_1` …"""


def look_up_at_once(graph: fx.Graph) -> Callable[[nn.Module], Any]:
    """Number the modules that a graph's nodes name, in place; returns what finds them for a root.

    A tensor is still read where it is used, from its module: an attribute may be computed (a parametrized weight).
    """
    numbers: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            node.target = f"_{numbers.setdefault(str(node.target), len(numbers))}"
        elif node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            node.target = f"_{numbers.setdefault(owner, len(numbers))}.{name}"
    tree: _Tree = {}
    for path, number in numbers.items():
        at = tree
        for part in path.split(".") if path else ():
            at = at.setdefault(part, {})
        at[_INDEX] = number

    def find(root: nn.Module) -> _Live:
        live = _Live()
        _fill(root, tree, live.__dict__)
        return live

    return find


def _fill(module: Any, tree: _Tree, found: dict[str, Any]) -> None:
    for name, below in tree.items():
        if name == _INDEX:
            found[f"_{below}"] = module
        else:
            child = module._modules.get(name)
            _fill(getattr(module, name) if child is None else child, below, found)

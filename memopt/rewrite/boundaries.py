"""Containers that are called as modules because they have hooks: each has a rewritten forward of its own.

Hooks must see a module being called (FSDP2 makes its parameters whole, Grad-CAM keeps its result), so a recording does
not look inside. What is inside is recorded when the container itself is called, as if memopt had been applied to it.
"""

from collections.abc import Callable
from dataclasses import replace

from torch import nn

from memopt.capture import Captured
from memopt.find import Found
from memopt.ir import ChainReport, Explanation
from memopt.rewrite.dispatch import Boundary
from memopt.rewrite.install import installed


def boundaries_of(captured: Captured, found: Found) -> tuple[Boundary, ...]:
    """The containers with hooks that forward calls, each once."""
    norms = {chain.norm for chain in found.chains} | {entry.norm for entry in found.rejected}
    boundaries: dict[str, Boundary] = {}
    position = 0
    for node in captured.order:
        position += node in norms
        if node.meta.get("boundary"):
            boundaries.setdefault(str(node.target), Boundary(str(node.target), position))
    return tuple(boundaries.values())


def install_within(
    model: nn.Module, boundaries: tuple[Boundary, ...], install: Callable[[nn.Module, str], object]
) -> None:
    """Have `install` give the boundaries of a recording, each with its path, rewriters where they have none."""
    for boundary in boundaries:
        module = model.get_submodule(boundary.path)
        if installed(module) is None:
            install(module, boundary.path)


def with_boundaries(
    known: Explanation, boundaries: tuple[Boundary, ...], explain: Callable[[str], Explanation]
) -> Explanation:
    """An explanation with what is inside the boundaries: chains in the order of execution, blocks counted anew.

    Args:
        known: of the module itself.
        boundaries: of its recording.
        explain: by the path of a boundary.
    """
    inside = [(boundary, explain(boundary.path)) for boundary in boundaries]
    chains: list[tuple[str, ChainReport]] = []
    for position in range(len(known.chains) + 1):
        for boundary, explanation in inside:
            if boundary.position == position:
                chains += [(boundary.path, chain) for chain in explanation.chains]
        chains += [("", chain) for chain in known.chains[position : position + 1]]
    numbers: dict[tuple[str, int], int] = {}
    for path, chain in chains:
        if chain.block:
            numbers.setdefault((path, chain.block), len(numbers) + 1)
    notes = [f"{b.path}: {note}" for b, known_inside in inside if known_inside.chains for note in known_inside.notes]
    later = [b.path for b, known_inside in inside if not known_inside.captured]
    notes += [f"{path} has hooks: it is recorded at its first training forward." for path in later]
    return replace(
        known,
        ran=known.ran or any(explanation.ran for _, explanation in inside),
        chains=tuple(
            replace(chain, module=joined(path, chain.module), block=numbers.get((path, chain.block), 0))
            for path, chain in chains
        ),
        notes=(*known.notes, *notes),
    )


def joined(path: str, name: str) -> str:
    """The dotted path of what is called `name` inside the module at `path`; either may be empty."""
    return ".".join(part for part in (path, name) if part)

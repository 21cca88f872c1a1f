"""What was found in a model and what became of it: frozen values that find, plan and report share."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, Protocol, TypeVar


@dataclass(frozen=True, slots=True)
class ChainReport:
    """One chain of a model and what was done with it.

    Attributes:
        node: name of the chain's anchor (the concat, or the norm where a block's first layer has no concat).
        module: dotted path of the module whose norm the chain runs through; "" where it is functional.
        source: "file.py:line" of the user's code at the anchor; "" if unknown.
        block: number of the dense block, counted from 1 in the order of execution; 0 when it belongs to none.
        role: "layer" when the chain ends in a feature of the block, "exit" when it leaves it (a transition, the
            final norm).
        action: "rewritten" or "rejected".
        level: recompute level used, "keep", "concat" or "layer"; None when rejected.
        numerics: how it runs, "exact" or "fast"; None when rejected.
        reason: why it was rejected, or why a memory budget gave it its level; None where there is nothing to say.
        saved_bytes: activations that eager keeps for backward and the rewritten chain does not, by their shapes.
        recomputed_bytes: what computing them again reads and writes.
        recomputed_flops: floating-point operations of that, multiplications and additions.
        region: name of the region it runs in; "" when rejected.
    """

    node: str
    module: str
    source: str
    block: int
    role: Literal["layer", "exit"]
    action: Literal["rewritten", "rejected"]
    level: Literal["keep", "concat", "layer"] | None
    numerics: Literal["exact", "fast"] | None
    reason: str | None
    saved_bytes: int = 0
    recomputed_bytes: int = 0
    recomputed_flops: int = 0
    region: str = ""


@dataclass(frozen=True, slots=True)
class Explanation:
    """What memopt did with a model, as `memopt.explain` returns it.

    Attributes:
        applied: `memopt.apply` is in force on the model.
        captured: the forward has been recorded at least once (lazy `apply` records at the first training forward).
        ran: the rewritten forward has run at least once.
        chains: every chain found, in the order of execution, of the latest capture.
        notes: anything else worth knowing, one sentence each (why capture failed, why nothing was rewritten…).
    """

    applied: bool
    captured: bool
    ran: bool
    chains: tuple[ChainReport, ...]
    notes: tuple[str, ...]

    @property
    def rewritten(self) -> tuple[ChainReport, ...]:
        """Chains that run as recomputing segments."""
        return tuple(chain for chain in self.chains if chain.action == "rewritten")

    @property
    def rejected(self) -> tuple[ChainReport, ...]:
        """Chains that were left as they were, each with its reason."""
        return tuple(chain for chain in self.chains if chain.action == "rejected")

    def __str__(self) -> str:
        if not self.captured and not self.chains:  # nothing is known of its chains, which is not that it has none
            return "memopt: " + "\n  ".join(self.notes)
        lines = [f"memopt: {len(self.chains)} chains found, {len(self.rewritten)} rewritten"]
        for number, block in by_block(self.chains).items():
            levels = Counter(str(chain.level) for chain in block if chain.action == "rewritten")
            name = f"block {number}" if number else "in no block"
            lines += [
                f"  {name}: {count} chain{'s' if count > 1 else ''}, {_level(level)}" for level, count in levels.items()
            ]
            lines += [
                f"  {name}: {c.node} ({c.source or c.module}) left alone, because {c.reason}"
                for c in block
                if c.action == "rejected"
            ]
        lines += [f"  {note}" for note in self.notes]
        return "\n".join(lines)


class _OfBlock(Protocol):
    @property
    def block(self) -> int: ...


OfBlock = TypeVar("OfBlock", bound=_OfBlock)


def by_block(members: Iterable[OfBlock]) -> dict[int, list[OfBlock]]:
    """Chains, or layers of a plan, by dense block, in the order of execution; those of no block (0) last."""
    grouped: dict[int, list[OfBlock]] = {}
    for member in members:
        grouped.setdefault(member.block, []).append(member)
    return dict(sorted(grouped.items(), key=lambda item: (item[0] == 0, item[0])))


def _level(level: str) -> str:
    return "kept as eager keeps them" if level == "keep" else f"recompute {level}"


def join_explanations(whole: Explanation, parts: Iterable[tuple[str, Explanation]]) -> Explanation:
    """What became of a model that was rewritten in parts, each with its path: blocks are numbered on."""
    chains: list[ChainReport] = []
    notes = list(whole.notes)
    ran = captured = False
    for path, part in parts:
        first = max((chain.block for chain in chains), default=0)
        chains += [
            replace(c, block=c.block + first if c.block else 0, module=f"{path}.{c.module}".rstrip("."))
            for c in part.chains
        ]
        notes += [f"In {path}: {note}" for note in part.notes if part.chains or not part.captured]
        ran, captured = ran or part.ran, captured or part.captured
    return Explanation(whole.applied, captured, ran, tuple(chains), tuple(dict.fromkeys(notes)))

"""What became of every chain, block by block: as a tree on a terminal, and as data."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any

from rich.text import Text
from rich.tree import Tree

from memopt.ir import ChainReport, Explanation, by_block, mebibytes
from memopt.report.rows import from_here

SCHEMA = 1

SAVED_LEGEND = (
    "Less saved: what eager saves for backward and these chains do not, by its shapes alone; what memopt saves instead "
    "is not taken off. What a whole step takes, before and after, is predicted by memopt optimize."
)


def explanation_tree(explanation: Explanation) -> Tree:
    """A branch for each dense block, a leaf for each chain in it."""
    chains = explanation.chains
    found, rewritten = len(chains), len(explanation.rewritten)
    tree = Tree(Text(f"{found} chains found, {rewritten} rewritten, {found - rewritten} left alone{_saved(chains)}"))
    for number, block in by_block(chains).items():
        name = f"dense block {number}" if number else "in no dense block"
        done = sum(chain.action == "rewritten" for chain in block)
        shared = _shared_reasons(block)
        because = "".join(
            f"; {count} {'left alone' if action == 'rejected' else 'at their level'} because {reason}"
            for (action, reason), count in shared.items()
        )
        branch = tree.add(Text(f"{name}: {done} of {len(block)} rewritten{_saved(block)}{because}", style="bold"))
        for chain in block:
            branch.add(_leaf(replace(chain, reason=None) if (chain.action, chain.reason) in shared else chain))
    return tree


def _shared_reasons(block: Iterable[ChainReport]) -> dict[tuple[str, str], int]:
    """The most frequent reason of each action, where several chains have it: it is said once, not at each of them."""
    counts = Counter((chain.action, chain.reason) for chain in block if chain.reason and not _has_own_figures(chain))
    shared: dict[tuple[str, str], int] = {}
    for (action, reason), count in counts.most_common():
        if count > 1 and all(other != action for other, _ in shared):
            shared[action, reason] = count
    return shared


def _has_own_figures(chain: ChainReport) -> bool:
    """Whether the reason is of this chain alone, though another's may read alike."""
    return chain.action == "rewritten" and any(map(str.isdigit, chain.reason or ""))


def explanation_document(explanation: Explanation, target: str | None = None) -> dict[str, Any]:
    """What `memopt explain --json` writes; sizes in bytes.

    Args:
        explanation: from `memopt.explain`.
        target: what was explained, as the user named it.
    """
    return {
        "schema": SCHEMA,
        "target": target,
        "chains": {
            "found": len(explanation.chains),
            "rewritten": len(explanation.rewritten),
            "saved_bytes": sum(chain.saved_bytes for chain in explanation.chains),
        },
        "blocks": [
            {
                "block": number,
                "saved_bytes": sum(chain.saved_bytes for chain in block),
                "chains": [asdict(chain) for chain in block],
            }
            for number, block in by_block(explanation.chains).items()
        ],
        "notes": list(explanation.notes),
    }


def _leaf(chain: ChainReport) -> Text:
    where = chain.module or chain.node
    place = f" ({from_here(chain.source)})" if chain.source else ""
    if chain.action == "rejected":
        because = f", because {chain.reason}" if chain.reason else ""
        return Text.assemble(f"{where}{place}: ", ("left alone", "yellow"), because)
    kind = " exit" if chain.role == "exit" else ""
    how = "on fused kernels" if chain.numerics == "fast" else "exactly"
    what = f"keeps what eager keeps, {how}" if chain.level == "keep" else f"recomputes {chain.level} {how}"
    because = f"; {chain.reason}" if chain.reason else ""
    return Text.assemble(f"{where}{kind}{place}: ", (what, "green"), _saved([chain]), because)


def _saved(chains: Iterable[ChainReport]) -> str:
    saved = sum(chain.saved_bytes for chain in chains)
    return f", {mebibytes(saved)} less saved" if saved else ""

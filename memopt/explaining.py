"""What became of every chain of a recorded forward, as `memopt.explain` says it."""

from typing import Any

from torch import fx

from memopt.capture import Captured
from memopt.find import Chain, Rejected
from memopt.ir import ChainReport, Explanation, FusedPlan, Level, RegionDraft
from memopt.plan import unsaved_bytes
from memopt.rewrite.regions import Group, module_of

NOTHING_FOUND = "No concat → norm → activation chain was found: nothing to rewrite."


def explain_rewriting(
    captured: Captured,
    groups: list[Group],
    drafts: list[RegionDraft],
    rejected: list[Rejected],
    fused: list[FusedPlan | str | None],
) -> Explanation:
    """Reports in the order of execution.

    Args:
        captured: the recorded forward.
        groups, drafts, fused: the regions: which chains, what is computed, and the plan on fused kernels, the reason
            why there is none, or None where none was asked for.
        rejected: chains that are left alone.
    """
    reports: dict[fx.Node, ChainReport] = {}
    slow: list[str] = []
    for group, draft, plan in zip(groups, drafts, fused, strict=True):
        numerics = "fast" if isinstance(plan, FusedPlan) else "exact"
        unsaved = unsaved_bytes(draft)
        levels = {step.name: step.level for step in draft.steps}
        for c in group.chains:
            saved = sum(unsaved.get(node.name, 0) for node in c.nodes)
            reports[c.norm] = _report(c, c.role, "rewritten", levels[c.norm.name], numerics, None, saved)
        if isinstance(plan, str):
            blocks = " and ".join(str(block) for block in sorted({chain.block for chain in group.chains}))
            slow.append(f"Dense block {blocks} runs exactly, not on fused kernels: {plan}.")
    reports |= {entry.norm: _report(entry, "layer", "rejected", None, None, entry.reason, 0) for entry in rejected}
    in_order = tuple(reports[node] for node in captured.order if node in reports)
    notes = slow if reports else [NOTHING_FOUND]
    return Explanation(True, True, False, in_order, tuple(notes))


def _report(
    entry: Chain | Rejected,
    role: Any,
    action: Any,
    level: Level | None,
    numerics: Any,
    reason: str | None,
    saved_bytes: int,
) -> ChainReport:
    return ChainReport(
        node=entry.anchor.name,
        module=module_of(entry.norm),
        source=entry.anchor.meta.get("source", ""),
        block=entry.block,
        role=role,
        action=action,
        level=level,
        numerics=numerics,
        reason=reason,
        saved_bytes=saved_bytes,
    )

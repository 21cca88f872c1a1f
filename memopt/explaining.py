"""What became of every chain of a recorded forward, as `memopt.explain` says it."""

from dataclasses import replace
from typing import Literal

from torch import fx

from memopt.capture import Captured
from memopt.find import Chain, Rejected
from memopt.ir import ChainReport, Explanation, FusedPlan, MemoryPlan, RegionDraft
from memopt.plan import Work, recomputed_work, unsaved_bytes
from memopt.rewrite import Region
from memopt.rewrite.regions import module_of

NOTHING_FOUND = "No concat → norm → activation chain was found: nothing to rewrite."

_AUTO_NOTE = (
    'Numerics "auto" means exact on this machine and fused kernels on a GPU, which is what is predicted for one. '
    'Ask for "exact" to have eager\'s kernels predicted.'
)
_NOT_FUSED_NOTE = (
    'Numerics "auto" means exact on this machine and fused kernels on a GPU where there are some. For this model there '
    "are none: what is predicted is of eager's."
)


def explain_rewriting(
    captured: Captured,
    regions: list[Region],
    drafts: list[RegionDraft],
    rejected: list[Rejected],
    not_fused: list[str | None],
) -> Explanation:
    """Reports in the order of execution.

    Args:
        captured: the recorded forward.
        regions, drafts: which chains run together, what they compute and how.
        rejected: chains that are left alone.
        not_fused: for each region, why it does not run on fused kernels; None where it does or was not asked to.
    """
    reports: dict[fx.Node, ChainReport] = {}
    slow: list[str] = []
    for region, draft, why_not in zip(regions, drafts, not_fused, strict=True):
        unsaved, work = unsaved_bytes(draft, region.plan), recomputed_work(draft, region.plan)
        levels = {step.name: step.level for step in draft.steps}
        numerics: Literal["exact", "fast"] = "fast" if isinstance(region.plan, FusedPlan) else "exact"
        for c in region.group.chains:
            again = sum((work.get(node.name, Work()) for node in c.nodes), Work())
            reports[c.norm] = replace(
                _report(c, "rewritten"),
                role=c.role,
                level=levels[c.norm.name],
                numerics=numerics,
                saved_bytes=sum(unsaved.get(node.name, 0) for node in c.nodes),
                recomputed_bytes=again.moved_bytes,
                recomputed_flops=again.flops,
                region=region.label,
            )
        if why_not is not None:
            blocks = " and ".join(str(block) for block in sorted({chain.block for chain in region.group.chains}))
            slow.append(f"Dense block {blocks} runs exactly, not on fused kernels: {why_not}.")
    reports |= {entry.norm: replace(_report(entry, "rejected"), reason=entry.reason) for entry in rejected}
    in_order = tuple(reports[node] for node in captured.order if node in reports)
    notes = slow if reports else [NOTHING_FOUND]
    return Explanation(True, True, False, in_order, tuple(notes))


def with_plan(explanation: Explanation, plan: MemoryPlan, path: str) -> Explanation:
    """The same with the memory budget's reasons, for a module at `path`; the whole model's says what comes of it."""
    reasons = {layer.path: layer.reason for layer in plan.layers}
    chains = tuple(
        replace(c, reason=reasons.get(f"{path}.{c.module}".lstrip("."))) if c.action == "rewritten" else c
        for c in explanation.chains
    )
    return replace(explanation, chains=chains, notes=(*explanation.notes, *(() if path else (plan.summary,))))


def _report(entry: Chain | Rejected, action: Literal["rewritten", "rejected"]) -> ChainReport:
    return ChainReport(
        node=entry.anchor.name,
        module=module_of(entry.norm),
        source=entry.anchor.meta.get("source", ""),
        block=entry.block,
        role="layer",
        action=action,
        level=None,
        numerics=None,
        reason=None,
    )


def notes_of_the_target(there: Explanation, here: Explanation) -> list[str]:
    """What a reader must know of a prediction that is of other kernels than run here."""
    if not here.rewritten:
        return []
    fused = any(chain.numerics == "fast" for chain in there.rewritten)
    own = [note for note in there.notes if note not in here.notes]
    return [_AUTO_NOTE if fused else _NOT_FUSED_NOTE, *(f"On a GPU: {note}" for note in own)]

"""The public calls. `_rewrite_forward` is the whole pipeline on one screen."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from memopt.arguments import as_tuple, checked, unwrapped
from memopt.capture import Captured, capture
from memopt.config import Config, Numerics
from memopt.errors import EquivalenceError
from memopt.find import Chain, Rejected, find_chains
from memopt.ir import ChainReport, Explanation, FusedPlan, Level, RegionDraft, waits_for_others
from memopt.measure.bound import check_bound
from memopt.measure.compare import CHECK_SAMPLES, Comparison, first_samples
from memopt.measure.compare import compare as measure_comparison
from memopt.measure.equivalence import check_equivalence
from memopt.plan import plan_fused, plan_region
from memopt.rewrite import Region, install, installed, own_forward, splice, uninstall
from memopt.rewrite.boundaries import boundaries_of, install_within, with_boundaries
from memopt.rewrite.dispatch import Rewriter, RewrittenForward
from memopt.rewrite.regions import Group, draft_region, group_chains
from memopt.runtime import take_blas_workspaces, unsupported

ModuleT = TypeVar("ModuleT", bound=nn.Module)

NOT_RUN_YET = "The rewritten forward has not run yet."
NOTHING_FOUND = "No concat → norm → activation chain was found: nothing to rewrite."

_left_alone: WeakKeyDictionary[nn.Module, Explanation] = WeakKeyDictionary()

_AUTO_NOTE = (
    'Numerics "auto" means exact on this machine and fused kernels on a GPU, which is what is predicted for one. '
    'Ask for "exact" to have eager\'s kernels predicted.'
)


def apply(
    model: ModuleT, example_inputs: tuple[Any, ...] | torch.Tensor | None = None, *, config: Config | None = None
) -> ModuleT:
    """Make a model train in memory linear in its depth. Returns the same object.

    Only what `forward` does while gradients are recorded changes; parameters, buffers, state_dict, hooks, attributes
    and `isinstance` stay. Calling it again changes the configuration; `memopt.remove` undoes it.

    Args:
        model: any module. `nn.DataParallel` and `DistributedDataParallel` are looked into.
        example_inputs: positional inputs of forward. Given: the model is recorded, planned and (unless
            `config.verify` is False) compared with the untouched model now, in its present mode. Not given: recorded
            at the first forward that records gradients, from its real inputs.
        config: what to do; `memopt.Config()` if None.

    Raises:
        ModelError: `model` is no module, but its class or something else.
        ConfigError: `config` is no `Config`.
        CaptureError: `example_inputs` are given and forward cannot be recorded, or the model is of a kind that
            cannot be rewritten (a ScriptModule, a compiled model); the message says what to do instead.
        EquivalenceError: the rewritten model computes something else than the untouched one. The model is left as
            it was.
    """
    target = unwrapped(model)
    config = checked(config, example_inputs)
    remove(target)
    rewriter = Rewriter(_builder(config))
    _left_alone.pop(target, None)
    install(target, rewriter, _reapply(config))
    if example_inputs is None:
        return model
    try:
        _prepare_now(target, rewriter, as_tuple(example_inputs), config)
    except BaseException:
        remove(target)
        raise
    return model


def remove(model: ModuleT) -> ModuleT:
    """Make a model exactly what it was before `memopt.apply`. Does nothing to a model that was never changed."""
    for module in unwrapped(model).modules():
        if installed(module) is not None:
            uninstall(module)
    return model


def explain(model: nn.Module) -> Explanation:
    """What was found in a model, what was done with each chain, and the reason wherever nothing was."""
    target = unwrapped(model)
    rewriter = installed(target)
    if not isinstance(rewriter, Rewriter):
        note = "memopt.apply is not in force on this model."
        return _left_alone.get(target, Explanation(False, False, False, (), (note,)))
    if rewriter.latest is None:
        note = "Nothing is recorded yet: the first forward that records gradients does it."
        return Explanation(True, False, False, (), (note,))
    latest = rewriter.latest
    own = replace(latest.explanation, applied=True, ran=rewriter.ran)
    known = with_boundaries(own, latest.boundaries, lambda path: explain(target.get_submodule(path)))
    notes = [note for note in known.notes if note != NOTHING_FOUND or not known.chains]
    notes += [NOT_RUN_YET] if own.rewritten and not rewriter.ran else []
    return replace(known, notes=tuple(notes))


def _prepare_now(target: nn.Module, rewriter: Rewriter, inputs: tuple[Any, ...], config: Config) -> None:
    """Record and plan from example inputs, and verify; takes memopt off where there is nothing to rewrite."""
    with torch.enable_grad():
        rewritten = rewriter.prepare(target, own_forward(target), inputs, {})
    if rewritten.function is None and not rewritten.boundaries:
        remove(target)
        _left_alone[target] = replace(rewritten.explanation, applied=False)
    elif config.verify:
        _verify(target, inputs, rewriter, config)


def _verify(target: nn.Module, inputs: tuple[Any, ...], rewriter: Rewriter, config: Config) -> None:
    """Train copies of both for a step on two samples and compare every bit.

    Not where other processes take part, who may not be verifying now: this one would wait for them for ever.

    Raises:
        EquivalenceError: they differ; the message names the first tensor that does.
    """
    waits = waits_for_others(target)
    if waits is not None:
        rewriter.note(f"Not verified: {waits} would wait for the other processes.")
        return
    rewritten = copy.deepcopy(target)
    naive = remove(copy.deepcopy(target))
    try:
        few = first_samples(inputs, CHECK_SAMPLES)
        fused = _may_be_fused(target, rewriter, few, config)
        result = check_bound(naive, rewritten, few) if fused else check_equivalence(naive, rewritten, [few], steps=1)
    except torch.OutOfMemoryError:
        rewriter.note("Not verified: the comparison with the untouched model did not fit in memory.")
        return
    if not result.passed:
        raise EquivalenceError(
            f"{type(target).__name__}: the rewritten model differs from the untouched one, first in "
            f"{next(iter(result.differing), 'its outputs')}. The model is left as it was. Please report it."
        )


def _may_be_fused(target: nn.Module, rewriter: Rewriter, inputs: tuple[Any, ...], config: Config) -> bool:
    """Whether a chain runs on fused kernels, or may do so inside a boundary, which is not recorded yet."""
    if any(chain.numerics == "fast" for chain in explain(target).chains):
        return True
    devices = [leaf.device for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]
    has_boundaries = rewriter.latest is not None and bool(rewriter.latest.boundaries)
    return has_boundaries and any(_wants_fused(config.numerics, device) for device in devices)


def compare(
    make_model: Callable[[], nn.Module],
    example_inputs: tuple[Any, ...] | torch.Tensor,
    *,
    config: Config | None = None,
    device: torch.device | None = None,
    amp: torch.dtype | None = None,
    measure: bool = True,
    on_stage: Callable[[str], object] = lambda name: None,
) -> Comparison:
    """Before and after as data: equivalence, predicted GPU memory, measured memory and time of a training step.

    Args:
        make_model: builds a fresh model on the CPU; called several times.
        example_inputs: positional inputs of forward, on the CPU; the batch is the first dimension.
        config: what to do; `memopt.Config()` if None.
        device: where to check and measure; None for the GPU if torch has one, else the CPU.
        amp: autocast dtype or None.
        measure: run real training steps; False predicts only.
        on_stage: told what is done next, in a few words.

    Raises:
        CaptureError: forward cannot be recorded.
    """
    chosen = replace(checked(config, example_inputs), verify=False)  # the comparison is the verification
    # The prediction is for a GPU, where "auto" means fused kernels, also if this machine has none.
    on_target = replace(chosen, numerics="fast") if chosen.numerics == "auto" else chosen
    result = measure_comparison(
        make_model,
        as_tuple(example_inputs),
        apply=lambda model, inputs: apply(model, inputs, config=chosen),
        apply_on_target=lambda model: apply(model, config=on_target),
        remove=remove,
        explain=explain,
        device=device,
        amp=amp,
        measure=measure,
        on_stage=on_stage,
    )
    is_predicted = result.predicted_after is not None and bool(result.explanation.rewritten)
    if chosen.numerics == "auto" and result.device != "cuda" and is_predicted:
        return replace(result, notes=(*result.notes, _AUTO_NOTE))
    return result


def _builder(config: Config) -> Callable[..., RewrittenForward]:
    level: Level = "concat" if config.recompute == "concat" else "layer"

    def build(
        model: nn.Module, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> RewrittenForward:
        rewritten = _rewrite_forward(model, plain, args, kwargs, level, config.numerics)
        install_within(model, rewritten.boundaries, lambda: Rewriter(build), _reapply(config))
        return rewritten

    return build


def _reapply(config: Config) -> Callable[[nn.Module], nn.Module]:
    return lambda duplicate: apply(duplicate, config=config)


def _rewrite_forward(
    model: nn.Module,
    plain: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    level: Level,
    numerics: Numerics,
) -> RewrittenForward:
    captured = capture(model, lambda *a, **k: plain(model, *a, **k), args, kwargs)
    found = find_chains(captured.graph, model)
    groups, refused = group_chains(captured.graph, found)
    drafts = [draft_region(group, found) for group in groups]
    fused = [_fused(group, draft, level, numerics) for group, draft in zip(groups, drafts, strict=True)]
    explanation = _explain(captured, groups, [*found.rejected, *refused], level, fused)
    boundaries = boundaries_of(captured, found)
    if not groups:
        return RewrittenForward(None, None, explanation, boundaries)
    regions = [
        Region(group, plan if isinstance(plan, FusedPlan) else plan_region(draft, level))
        for group, draft, plan in zip(groups, drafts, fused, strict=True)
    ]
    spliced = splice(captured, found, regions)
    take_blas_workspaces(groups[0].nodes[0].meta["val"].device)
    return RewrittenForward(spliced.function, captured.output_spec, explanation, boundaries)


def _fused(group: Group, draft: RegionDraft, level: Level, numerics: Numerics) -> FusedPlan | str | None:
    """A region's plan on fused kernels, or the reason why there is none; None where that was not asked for."""
    device = group.nodes[0].meta["val"].device
    if not _wants_fused(numerics, device):
        return None
    reason = unsupported(device)
    return plan_fused(draft, level) if reason is None else reason


def _wants_fused(numerics: Numerics, device: torch.device) -> bool:
    return numerics == "fast" or (numerics == "auto" and device.type == "cuda")


def _explain(
    captured: Captured,
    groups: list[Group],
    rejected: list[Rejected],
    level: Level,
    fused: list[FusedPlan | str | None],
) -> Explanation:
    reports: dict[fx.Node, ChainReport] = {}
    slow: list[str] = []
    for group, plan in zip(groups, fused, strict=True):
        numerics = "fast" if isinstance(plan, FusedPlan) else "exact"
        reports |= {c.norm: _report(c, c.role, "rewritten", level, numerics, None) for c in group.chains}
        if isinstance(plan, str):
            blocks = " and ".join(str(block) for block in sorted({chain.block for chain in group.chains}))
            slow.append(f"Dense block {blocks} runs exactly, not on fused kernels: {plan}.")
    reports |= {entry.norm: _report(entry, "layer", "rejected", None, None, entry.reason) for entry in rejected}
    in_order = tuple(reports[node] for node in captured.order if node in reports)
    notes = slow if reports else [NOTHING_FOUND]
    return Explanation(True, True, False, in_order, tuple(notes))


def _report(
    entry: Chain | Rejected, role: Any, action: Any, level: Level | None, numerics: Any, reason: str | None
) -> ChainReport:
    return ChainReport(
        node=entry.anchor.name,
        module=str(entry.norm.target) if entry.norm.op == "call_module" else entry.norm.meta.get("module", ""),
        source=entry.anchor.meta.get("source", ""),
        block=entry.block,
        role=role,
        action=action,
        level=level,
        numerics=numerics,
        reason=reason,
    )

"""The public calls. `_rewrite_forward` is the whole pipeline on one screen."""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from memopt.arguments import as_tuple, checked, unwrapped
from memopt.capture import capture, keeping_python_values, through_checkpoints
from memopt.config import Config, Numerics
from memopt.errors import CaptureError
from memopt.explaining import NOTHING_FOUND, explain_rewriting
from memopt.find import find_chains
from memopt.ir import (
    Explanation,
    FusedPlan,
    RegionDraft,
    has_own_forward,
    join_explanations,
    waits_for_others,
)
from memopt.measure.compare import CHECK_SAMPLES, Comparison, first_samples
from memopt.measure.compare import compare as measure_comparison
from memopt.plan import plan_fused, plan_region
from memopt.rewrite import Region, install, installed, own_forward, splice, uninstall
from memopt.rewrite.boundaries import boundaries_of, install_within, joined, with_boundaries
from memopt.rewrite.dispatch import Rewriter, RewrittenForward
from memopt.rewrite.regions import Group, draft_region, group_chains
from memopt.runtime import take_blas_workspaces, unsupported
from memopt.verify import Copies, verify

ModuleT = TypeVar("ModuleT", bound=nn.Module)

NOT_RUN_YET = "The rewritten forward has not run yet."

_left_alone: WeakKeyDictionary[nn.Module, Explanation] = WeakKeyDictionary()

_AUTO_NOTE = (
    'Numerics "auto" means exact on this machine and fused kernels on a GPU, which is what is predicted for one. '
    'Ask for "exact" to have eager\'s kernels predicted.'
)


def apply(
    model: ModuleT, example_inputs: tuple[Any, ...] | torch.Tensor | None = None, *, config: Config | None = None
) -> ModuleT:
    """Make a model train in memory linear in its depth. Returns the same object.

    Where forward cannot be recorded as a whole, the largest submodules are rewritten whose forward can. Only what
    `forward` does while gradients are recorded changes; parameters, buffers, state_dict, hooks, attributes
    and `isinstance` stay. Calling it again changes the configuration; `memopt.remove` undoes it.

    Args:
        model: any module. `nn.DataParallel` and `DistributedDataParallel` are looked into.
        example_inputs: positional inputs of forward. Given: the model is recorded, planned and (unless
            `config.verify` is False) compared with the untouched model now, in its present mode; `explain` notes where
            memory was too short for that, wholly or in part. Not given: recorded at the first forward that records
            gradients, from its real inputs.
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
    _left_alone.pop(target, None)
    rewriter = _install(target, _Shared(config))
    if example_inputs is None:
        return model
    try:
        _prepare_now(target, rewriter, as_tuple(example_inputs), config)
    except BaseException:
        remove(target)
        raise
    return model


@dataclass(frozen=True, slots=True)
class _Shared:
    """What all rewriters of one model share: `warned`, reasons that the user has been told; `only`, which chains of
    each are to be rewritten, None for all."""

    config: Config
    warned: set[str] = field(default_factory=set)
    only: slice | None = None


def _install(target: nn.Module, shared: _Shared, path: str = "") -> Rewriter:
    """Put memopt on one module, at `path`; on others inside it when its recording stops at them, or cannot be made."""

    def build(
        model: nn.Module, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> RewrittenForward:
        rewritten = _rewrite_forward(model, plain, args, kwargs, shared, path)
        install_within(model, rewritten.boundaries, lambda module, name: _install(module, shared, joined(path, name)))
        return rewritten

    rewriter = Rewriter(build, lambda module: _descend(module, shared, path), shared.warned)
    install(target, rewriter, lambda duplicate: apply(duplicate, config=shared.config))
    return rewriter


def _descend(module: nn.Module, shared: _Shared, path: str) -> None:
    """Where a forward cannot be recorded, those of the largest modules inside it may be."""
    for name, child in module.named_children():
        if not has_own_forward(child):
            _descend(child, shared, joined(path, name))
        elif next(child.children(), None) is not None and installed(child) is None:
            _install(child, shared, joined(path, name))


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
    known, latest = _known(target, rewriter), rewriter.latest
    if latest is None or latest.function is not None or latest.boundaries:
        return known
    inside = {path: r for path, module in target.named_modules() if path and (r := _recorded(module)) is not None}
    within = {f"{path}.{b.path}" for path, r in inside.items() if r.latest is not None for b in r.latest.boundaries}
    parts = [(path, r) for path, r in inside.items() if not any(f"{path}.".startswith(f"{b}.") for b in within)]
    explained = [(path, _known(target.get_submodule(path), r)) for path, r in parts]
    return join_explanations(known, explained) if explained else known


def _recorded(module: nn.Module) -> Rewriter | None:
    rewriter = installed(module)
    return rewriter if isinstance(rewriter, Rewriter) and rewriter.latest is not None else None


def _known(target: nn.Module, rewriter: Rewriter) -> Explanation:
    """What one rewriter has to say, and those of the containers that its recording stopped at."""
    latest = rewriter.latest
    if latest is None:
        note = "Nothing is recorded yet: the first forward that records gradients does it."
        return Explanation(True, False, False, (), (note,))
    own = replace(latest.explanation, applied=True, ran=rewriter.ran)
    known = with_boundaries(own, latest.boundaries, lambda path: explain(target.get_submodule(path)))
    notes = [note for note in known.notes if note != NOTHING_FOUND or not known.chains]
    notes += [NOT_RUN_YET] if own.rewritten and not rewriter.ran else []
    return replace(known, notes=tuple(notes))


def _prepare_now(target: nn.Module, rewriter: Rewriter, inputs: tuple[Any, ...], config: Config) -> None:
    """Record and plan from example inputs, and verify; takes memopt off where there is nothing to rewrite."""
    try:
        with torch.enable_grad():
            rewritten = rewriter.prepare(target, own_forward(target), inputs, {})
    except CaptureError as error:
        rewritten = _rewrite_parts(target, rewriter, inputs, error)
    if not rewritten.explanation.rewritten and not rewritten.boundaries:
        remove(target)
        _left_alone[target] = replace(rewritten.explanation, applied=False)
    elif config.verify:
        note = verify(target, _copies(target, config), inputs)
        if note is not None:
            rewriter.note(note)


def _rewrite_parts(
    target: nn.Module, rewriter: Rewriter, inputs: tuple[Any, ...], error: CaptureError
) -> RewrittenForward:
    """What becomes of a model whose forward cannot be recorded as a whole: seen by running it on a copy.

    Raises:
        CaptureError: no submodule is rewritten either, or running it would wait for other processes.
    """
    if waits_for_others(target) is not None:
        raise error
    with keeping_python_values(target), warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        try:
            with torch.random.fork_rng(devices=[]):
                trial = copy.deepcopy(target)
                trial(*first_samples(inputs, CHECK_SAMPLES))
        except Exception:
            raise error from None  # the model itself refuses these inputs
    explanation = explain(trial)
    if not explanation.rewritten:
        raise error
    return rewriter.rewrite_parts(target, replace(explanation, ran=False))


def _copies(target: nn.Module, config: Config) -> Copies:
    def rewritten(chains: slice | None) -> nn.Module:
        duplicate = remove(copy.deepcopy(target))
        _install(duplicate, _Shared(config, only=chains))
        return duplicate

    return Copies(lambda: remove(copy.deepcopy(target)), rewritten, explain)


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
        checking=through_checkpoints,
        device=device,
        amp=amp,
        measure=measure,
        on_stage=on_stage,
    )
    is_predicted = result.predicted_after is not None and bool(result.explanation.rewritten)
    if chosen.numerics == "auto" and result.device != "cuda" and is_predicted:
        return replace(result, notes=(*result.notes, _AUTO_NOTE))
    return result


def _rewrite_forward(
    model: nn.Module,
    plain: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    shared: _Shared,
    path: str,
) -> RewrittenForward:
    config = shared.config
    captured = capture(model, lambda *a, **k: plain(model, *a, **k), args, kwargs)
    found = find_chains(captured.graph, model)
    if shared.only is not None:  # to see which is wrong
        found = replace(found, chains=found.chains[shared.only])
    groups, refused = group_chains(captured.graph, found)
    drafts = [draft_region(group, found, lambda norm: config.level_of(joined(path, norm))) for group in groups]
    fused = [_fused(group, draft, config.numerics) for group, draft in zip(groups, drafts, strict=True)]
    explanation = explain_rewriting(captured, groups, drafts, [*found.rejected, *refused], fused)
    boundaries = boundaries_of(captured, found)
    if not groups:
        return RewrittenForward(None, None, explanation, boundaries)
    regions = [
        Region(group, plan if isinstance(plan, FusedPlan) else plan_region(draft))
        for group, draft, plan in zip(groups, drafts, fused, strict=True)
    ]
    spliced = splice(captured, found, regions)
    take_blas_workspaces(groups[0].nodes[0].meta["val"].device)
    return RewrittenForward(spliced.function, captured.output_spec, explanation, boundaries)


def _fused(group: Group, draft: RegionDraft, numerics: Numerics) -> FusedPlan | str | None:
    """A region's plan on fused kernels, or the reason why there is none; None where that was not asked for."""
    device = group.nodes[0].meta["val"].device
    if numerics == "exact" or (numerics == "auto" and device.type != "cuda"):
        return None
    reason = unsupported(device)
    return plan_fused(draft) if reason is None else reason

"""The public calls."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from memopt.arguments import as_tuple, checked, require_own_forward, unwrapped
from memopt.budget import Rewriting, plan_call, plan_within
from memopt.capture import keeping_python_values, through_checkpoints
from memopt.config import Config
from memopt.errors import CaptureError, ConfigError
from memopt.explaining import NOTHING_FOUND, notes_of_the_target
from memopt.garbage import quick_collections
from memopt.ir import (
    Explanation,
    Level,
    MemoryPlan,
    has_own_forward,
    join_explanations,
    waits_for_others,
)
from memopt.measure.compare import CHECK_SAMPLES, Comparison, first_samples
from memopt.measure.compare import compare as measure_comparison
from memopt.measure.duplicate import duplicate
from memopt.pipeline import Shared, on_device, rewrite_forward
from memopt.rewrite import install, installed, own_forward, uninstall
from memopt.rewrite.boundaries import install_within, joined, with_boundaries
from memopt.rewrite.dispatch import Rewriter, RewrittenForward
from memopt.verify import Copies, verify

ModuleT = TypeVar("ModuleT", bound=nn.Module)

NOT_RUN_YET = "The rewritten forward has not run yet."
NOT_RECORDED_YET = "Nothing is recorded yet. Run a training forward, or call memopt.apply with example_inputs."

_left_alone: WeakKeyDictionary[nn.Module, Explanation] = WeakKeyDictionary()


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
        BudgetError: `example_inputs` are given and no step keeps within `config.memory_budget`. Without them the
            first forward raises it.
    """
    target, config = unwrapped(model), checked(config, example_inputs)
    require_own_forward(target)
    _apply(target, None if example_inputs is None else as_tuple(example_inputs), config)
    return model


def _apply(
    target: nn.Module, inputs: tuple[Any, ...] | None, config: Config, plan: MemoryPlan | None = None
) -> nn.Module:
    """The same with the levels of a plan, if there is one."""
    remove(target)
    _left_alone.pop(target, None)
    shared = Shared(config, plan=plan, levels={} if plan is None else plan.levels)
    rewriter = _install(target, shared)
    if inputs is not None:
        try:
            with quick_collections():
                _prepare_now(target, rewriter, inputs, shared)
        except BaseException:
            remove(target)
            raise
    return target


def _install(target: nn.Module, shared: Shared, path: str = "") -> Rewriter:
    """Put memopt on one module, at `path`; on others inside it when its recording stops at them, or cannot be made."""

    def build(
        model: nn.Module, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> RewrittenForward:
        if not path and shared.config.budget_bytes is not None:
            shared.plan = _plan(shared.config.budget_bytes, model, args, kwargs, shared.config)
            shared.levels = shared.plan.levels
        with quick_collections():
            rewritten = rewrite_forward(model, plain, args, kwargs, shared, path)
        install_within(model, rewritten.boundaries, lambda module, name: _install(module, shared, joined(path, name)))
        return rewritten

    rewriter = Rewriter(build, lambda module: _descend(module, shared, path), shared.warned)
    install(target, rewriter, lambda duplicate: _apply(duplicate, None, shared.config))
    return rewriter


def plan_memory(
    model: nn.Module, example_inputs: tuple[Any, ...] | torch.Tensor, *, config: Config | None = None
) -> MemoryPlan:
    """What `config.memory_budget` would make of a model, without changing it: levels, and what they should take.

    Args:
        model: any module, in the mode that it is trained in.
        example_inputs: positional inputs of forward; no values are read.
        config: with a memory budget. Numerics "auto" means what it would mean where the model is.

    Raises:
        ConfigError: `config` has no memory budget.
        BudgetError: no step keeps within it.
    """
    config = checked(config, example_inputs)
    if (budget_bytes := config.budget_bytes) is None:
        raise ConfigError('memopt.plan_memory plans for a budget. Pass config=memopt.Config(memory_budget="6GiB").')
    return _plan(budget_bytes, unwrapped(model), as_tuple(example_inputs), {}, config)


def _plan(
    budget_bytes: int, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], config: Config
) -> MemoryPlan:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return plan_call(budget_bytes, model, args, kwargs, _rewriting(on_device(device, config)))


def _rewriting(config: Config) -> Rewriting:
    """How models are rewritten to be predicted."""
    plain = replace(config, memory_budget=None, verify=False)

    def at(model: nn.Module, levels: Level | Mapping[str, Level]) -> nn.Module:
        if isinstance(levels, str):
            return _apply(model, None, replace(plain, recompute=levels))
        _install(remove(model), Shared(plain, levels=levels))
        return model

    return Rewriting(remove, at, explain)


def _descend(module: nn.Module, shared: Shared, path: str) -> None:
    """Where a forward cannot be recorded, those of the largest modules inside it may be."""
    if not path:
        shared.warn_of_unmatched([name for name, _ in module.named_modules()])
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
        return Explanation(True, False, False, (), (rewriter.why_not or NOT_RECORDED_YET,))
    own = replace(latest.explanation, applied=True, ran=rewriter.ran)
    known = with_boundaries(own, latest.boundaries, lambda path: explain(target.get_submodule(path)))
    some_inside = known.chains or len(known.notes) > len(own.notes)  # of containers, or to be recorded later
    notes = [note for note in known.notes if note != NOTHING_FOUND or not some_inside]
    notes += [NOT_RUN_YET] if own.rewritten and not rewriter.ran else []
    return replace(known, notes=tuple(notes))


def _prepare_now(target: nn.Module, rewriter: Rewriter, inputs: tuple[Any, ...], shared: Shared) -> None:
    """Record and plan from example inputs, and verify; takes memopt off where there is nothing to rewrite."""
    try:
        with torch.enable_grad():
            rewritten = rewriter.prepare(target, own_forward(target), inputs, {})
    except CaptureError as error:
        rewritten = _rewrite_parts(target, rewriter, inputs, error)
    if not rewritten.explanation.rewritten and not rewritten.boundaries:
        remove(target)
        _left_alone[target] = replace(rewritten.explanation, applied=False)
    elif shared.config.verify:
        note = verify(target, _copies(target, shared), inputs)
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
                trial = duplicate(target)
                trial(*first_samples(inputs, CHECK_SAMPLES))
        except Exception:
            raise error from None  # the model itself refuses these inputs
    explanation = explain(trial)
    if not explanation.rewritten:
        raise error
    return rewriter.rewrite_parts(target, replace(explanation, ran=False))


def _copies(target: nn.Module, shared: Shared) -> Copies:
    """Copies are rewritten at the levels that are in force, also where they are given fewer samples."""
    config = replace(shared.config, memory_budget=None)

    def rewritten(chains: slice | None) -> nn.Module:
        copy = remove(duplicate(target))
        _install(copy, Shared(config, {*shared.warned}, chains, shared.plan, shared.levels))
        return copy

    return Copies(lambda: remove(duplicate(target)), rewritten, explain)


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
        BudgetError: no step keeps within `config.memory_budget`.
    """
    chosen = replace(checked(config, example_inputs), verify=False)  # the comparison is the verification
    # The prediction is for a GPU, where "auto" means fused kernels, also if this machine has none.
    on_target = replace(chosen, numerics="fast") if chosen.numerics == "auto" else chosen
    inputs, plan = as_tuple(example_inputs), None
    if chosen.budget_bytes is not None:
        on_stage("planning for the memory budget")
        plan = plan_within(chosen.budget_bytes, make_model, inputs, _rewriting(on_target), amp=amp)
        chosen, on_target = replace(chosen, memory_budget=None), replace(on_target, memory_budget=None)
    there: list[Explanation] = []  # of what was predicted, then of what was measured

    def taken_off(model: nn.Module) -> nn.Module:
        there.append(explain(unwrapped(model)))
        return remove(model)

    result = measure_comparison(
        make_model,
        inputs,
        apply=lambda model, inputs: _apply(unwrapped(model), inputs, chosen, plan),
        apply_on_target=lambda model: _apply(unwrapped(model), None, on_target, plan),
        remove=taken_off,
        explain=explain,
        checking=through_checkpoints,
        device=device,
        amp=amp,
        measure=measure,
        on_stage=on_stage,
    )
    notes = dict.fromkeys(result.notes)  # before and after may have the same to say
    if chosen.numerics == "auto" and result.device != "cuda" and there and result.predicted_after is not None:
        notes |= dict.fromkeys(notes_of_the_target(there[0], result.explanation))
    return replace(result, plan=plan, notes=tuple(notes))

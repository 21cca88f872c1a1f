"""From a module's own forward to the rewritten one: the whole way on one screen."""

import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher
from typing import Any

import torch
from torch import nn

from memopt.capture import capture
from memopt.config import Config, Numerics
from memopt.explaining import explain_rewriting, with_plan
from memopt.find import find_chains
from memopt.ir import FusedPlan, Level, MemoryPlan, RegionDraft, first_names
from memopt.plan import plan_fused, plan_region
from memopt.rewrite import Region, splice
from memopt.rewrite.boundaries import boundaries_of, joined
from memopt.rewrite.dispatch import RewrittenForward, callers_level
from memopt.rewrite.regions import Group, draft_region, group_chains
from memopt.runtime import take_blas_workspaces, unsupported


@dataclass(slots=True)
class Shared:
    """What all rewriters of one model share.

    Attributes:
        config: the user's.
        warned: reasons that the user has been told.
        only: which chains of each are to be rewritten; None for all.
        plan: what the memory budget makes of the inputs recorded last.
        levels: of layers by their path, the plan's if there is one; they come before the configuration's.
    """

    config: Config
    warned: set[str] = field(default_factory=set)
    only: slice | None = None
    plan: MemoryPlan | None = None
    levels: Mapping[str, Level] = field(default_factory=dict)

    def level_of(self, path: str) -> Level:
        """How much of a layer is recomputed."""
        return self.levels.get(path) or self.config.level_of(path)

    def warn_of_unmatched(self, paths: Collection[str]) -> None:
        """Tell the user once of each pattern of `Config.recompute` that matches none of the paths of layers."""
        for pattern in self.config.unmatched(paths) if self.only is None else ():
            likely = sorted(dict.fromkeys(filter(None, paths)), key=lambda path: -_likeness(pattern, path))
            there_are = f"There are {first_names(likely)}." if likely else "There is none."
            text = f"Config.recompute: the pattern {pattern!r} matches no layer. {there_are}"
            if text not in self.warned:
                self.warned.add(text)
                warnings.warn(text, stacklevel=callers_level())


def rewrite_forward(
    model: nn.Module,
    plain: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    shared: Shared,
    path: str,
) -> RewrittenForward:
    """Record, find, plan, splice.

    Args:
        model: whose forward it is, at `path` of the user's model.
        plain: its own forward, unbound.
        args, kwargs: its inputs.
        shared: what is asked for.
        path: dotted; "" for the user's model itself.

    Raises:
        CaptureError: forward cannot be recorded.
    """
    captured = capture(model, lambda *a, **k: plain(model, *a, **k), args, kwargs)
    found = find_chains(captured.graph, model)
    if shared.plan is not None and shared.plan.stays_because is not None:
        found = found.with_all_rejected(shared.plan.stays_because)
    if shared.only is not None:  # to see which is wrong
        found = replace(found, chains=found.chains[shared.only])
    groups, refused = group_chains(captured.graph, found)
    drafts = [draft_region(group, found, lambda norm: shared.level_of(joined(path, norm))) for group in groups]
    fused = [_fused(group, draft, shared.config.numerics) for group, draft in zip(groups, drafts, strict=True)]
    regions = [
        Region(group, plan if isinstance(plan, FusedPlan) else plan_region(draft), f"{path}#{index}")
        for index, (group, draft, plan) in enumerate(zip(groups, drafts, fused, strict=True))
    ]
    not_fused = [plan if isinstance(plan, str) else None for plan in fused]
    explanation = explain_rewriting(captured, regions, drafts, [*found.rejected, *refused], not_fused)
    if shared.plan is not None:
        explanation = with_plan(explanation, shared.plan, path)
    boundaries = boundaries_of(captured, found)
    if not path:
        within = (name for name, _ in model.named_modules() if any(name.startswith(f"{b.path}.") for b in boundaries))
        shared.warn_of_unmatched([*(chain.module for chain in explanation.chains), *within])
    if not groups:
        return RewrittenForward(None, None, explanation, boundaries)
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


def on_device(device: torch.device, config: Config) -> Config:
    """The configuration with numerics "auto" spelt out for a device."""
    if config.numerics != "auto":
        return config
    fused = device.type == "cuda" and unsupported(device) is None
    return replace(config, numerics="fast" if fused else "exact")


def _likeness(pattern: str, path: str) -> float:
    """How alike the beginnings of a pattern and a path are."""
    return SequenceMatcher(None, pattern, path[: len(pattern)]).ratio()

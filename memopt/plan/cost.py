"""What a region saves, and what it computes again for that, in bytes and operations."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from memopt.ir import Compute, FusedNorm, FusedPlan, Kind, PlainStage, RegionDraft, RegionPlan, Step
from memopt.plan.keep import needed_by


@dataclass(frozen=True, slots=True)
class Work:
    """Bytes read and written, and floating-point operations."""

    moved_bytes: int = 0
    flops: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.moved_bytes + other.moved_bytes, self.flops + other.flops)


def unsaved_bytes(draft: RegionDraft, plan: RegionPlan | FusedPlan) -> dict[str, int]:
    """For each step, by name, the bytes of its result that eager keeps for backward and the plan does not."""
    kept = {*draft.outputs, *(_kept_fused(draft, plan) if isinstance(plan, FusedPlan) else plan.kept)}
    saved_in_eager = {v for step in draft.steps if step.output in draft.requires_grad for v in needed_by(step)}
    return {
        step.name: draft.extents[step.output].size_bytes
        for step in draft.steps
        if step.output in saved_in_eager and step.output not in kept
    }


def _kept_fused(draft: RegionDraft, plan: FusedPlan) -> Iterator[int]:
    for chain in plan.chains:
        yield chain.output
        if chain.kept is not None:
            yield draft.steps[_last(chain.stages[chain.kept])].output


def recomputed_work(draft: RegionDraft, plan: RegionPlan | FusedPlan) -> dict[str, Work]:
    """The work that backward does again, by the name of a step; of a fused chain, by that of its first step."""
    if isinstance(plan, FusedPlan):
        return {
            draft.steps[_first(chain.stages[0])].name: _fused(draft, chain.stages, chain.kept) for chain in plan.chains
        }
    work: dict[str, Work] = {}
    for instruction in plan.backward:
        if isinstance(instruction, Compute):
            step = draft.steps[instruction.step]
            work[step.name] = work.get(step.name, Work()) + _work(draft, step)
    return work


def _work(draft: RegionDraft, step: Step) -> Work:
    made = draft.extents[step.output].size_bytes
    read = sum(draft.extents[value].size_bytes for value in step.leaves)
    return Work(made + read, _flops(draft, step, step))


def _fused(draft: RegionDraft, stages: tuple[FusedNorm | PlainStage, ...], kept: int | None) -> Work:
    """Its last stage is never computed again; norms and activations are, while other kernels load what they read."""
    first = 0 if kept is None else kept + 1
    return sum((_stage(draft, stage) for stage in stages[first:-1]), Work())


def _stage(draft: RegionDraft, stage: FusedNorm | PlainStage) -> Work:
    if isinstance(stage, PlainStage):
        return _work(draft, draft.steps[stage.step])
    first, last = draft.steps[stage.norm], draft.steps[_last(stage)]
    read, made = draft.extents[first.inputs[0]].size_bytes, draft.extents[last.output].size_bytes
    return Work(read + made, _flops(draft, last, first))


def _flops(draft: RegionDraft, step: Step, source: Step) -> int:
    """Of a convolution, of which the window is known where it keeps the size of its input."""
    if step.op.kind is not Kind.CONVOLUTION:
        return 0
    channels = draft.extents[source.inputs[0]].size[1]
    return 2 * prod(draft.extents[step.output].size) * channels * prod(step.op.window or ())


def _first(stage: FusedNorm | PlainStage) -> int:
    return stage.step if isinstance(stage, PlainStage) else stage.norm


def _last(stage: FusedNorm | PlainStage) -> int:
    """The step whose result a stage makes; of a norm by itself what the activation behind it makes is as large."""
    if isinstance(stage, PlainStage):
        return stage.step
    return next((step for step in (stage.matmul, stage.conv) if step is not None), stage.norm)

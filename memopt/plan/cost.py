"""What a region computes again in backward, in bytes and operations: what keeping more would spare."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from memopt.ir import Compute, FusedNorm, FusedPlan, Kind, PlainStage, RegionDraft, RegionPlan, Step


@dataclass(frozen=True, slots=True)
class Work:
    """Bytes read and written, and floating-point operations."""

    moved_bytes: int = 0
    flops: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.moved_bytes + other.moved_bytes, self.flops + other.flops)


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
    return sum((work for stage in stages[first:-1] for work in _stage(draft, stage)), Work())


def _stage(draft: RegionDraft, stage: FusedNorm | PlainStage) -> Iterator[Work]:
    if isinstance(stage, PlainStage):
        yield _work(draft, draft.steps[stage.step])
        return
    product = stage.conv if stage.matmul is None else stage.matmul
    first = draft.steps[stage.norm]
    last = first if product is None else draft.steps[product]
    read, made = draft.extents[first.inputs[0]].size_bytes, draft.extents[last.output].size_bytes
    yield Work(read + made, 0 if product is None else _flops(draft, last, first))


def _flops(draft: RegionDraft, step: Step, source: Step) -> int:
    """Of a convolution, of which the window is known where it keeps the size of its input."""
    if step.op.kind is not Kind.CONVOLUTION:
        return 0
    channels = draft.extents[source.inputs[0]].size[1]
    return 2 * prod(draft.extents[step.output].size) * channels * prod(step.op.window or ())


def _first(stage: FusedNorm | PlainStage) -> int:
    return stage.step if isinstance(stage, PlainStage) else stage.norm

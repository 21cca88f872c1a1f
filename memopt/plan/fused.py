"""Can a region run on fused kernels, and how: which features lie where in one arena, and what each chain does.

Every concat of the region must be an interval of the arena, so the features are laid out in the order in which the
concats join them. Anything else has a reason, and the region runs exactly instead.
"""

from itertools import pairwise
from math import prod

import torch

from memopt.ir import (
    IDENTITY,
    MAX_CONV_CHANNELS,
    MAX_MATMUL_CHANNELS,
    MAX_POOL_WINDOW,
    MAX_WEIGHT_CHANNELS,
    FusedChain,
    FusedNorm,
    FusedPlan,
    Interval,
    Kind,
    PlainStage,
    Pooling,
    RegionDraft,
    Role,
    Step,
)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _NotFusedError(Exception):
    """Its text is the reason."""


def plan_fused(draft: RegionDraft) -> FusedPlan | str:
    """The plan of a region on fused kernels, or the reason why there is none."""
    try:
        return _Planner(draft).plan()
    except _NotFusedError as reason:
        return str(reason)


class _Planner:
    def __init__(self, draft: RegionDraft) -> None:
        self.draft = draft
        self.concats = {step.output: step for step in draft.steps if step.op.kind is Kind.CONCAT}
        self.readers: dict[int, list[int]] = {}
        for index, step in enumerate(draft.steps):
            for value in step.inputs:
                self.readers.setdefault(value, []).append(index)
        self.features = self._features()
        self.places = self._arena()
        self.channels = sum(place.stop - place.start for place in self.places.values())

    def plan(self) -> FusedPlan:
        draft = self.draft
        for step in draft.steps:
            if step.op.kind is Kind.SYNC_BATCH_NORM:
                raise _NotFusedError("its norms wait for the statistics of other processes (SyncBatchNorm)")
            if step.op.role is Role.GLUE:
                raise _NotFusedError(f"{step.name} stands between its layers, which no kernel does")
        chains = tuple(self._chain(index) for index, step in enumerate(draft.steps) if self._reads_arena(step))
        used = {s for chain in chains for stage in chain.stages for s in _steps_of(stage)}
        for index, step in enumerate(draft.steps):
            if step.op.kind is not Kind.CONCAT and index not in used and step.op.role is not Role.ACTIVATION:
                raise _NotFusedError(f"{step.name} is not part of a norm → activation → convolution chain")
        dtypes = {draft.extents[value].dtype for value in self.places}
        if len(dtypes) > 1:
            raise _NotFusedError("its features have several dtypes")
        (dtype,) = dtypes
        if dtype not in _DTYPES:
            raise _NotFusedError(f"there are no kernels for {dtype}")
        copied = {v: self._interval(v) for v in draft.outputs if v in self.places or v in self.concats}
        return FusedPlan(
            steps=draft.steps,
            input_count=draft.input_count,
            passed_through=draft.passed_through,
            outputs=draft.outputs,
            requires_grad=draft.requires_grad,
            channels=self.channels,
            dtype=dtype,
            placed=tuple((value, self.places[value]) for value in range(draft.input_count)),
            chains=chains,
            copied=copied,
            channels_last=frozenset(v for v, extent in draft.extents.items() if extent.channels_last),
        )

    def _features(self) -> list[list[int]]:
        """The features that each reading norm sees, in order: the leaves of a concat, or one feature."""
        seen = [list(step.leaves) for step in self.concats.values()]
        for step in self.draft.steps:
            source = step.inputs[0]
            shared = source in self.draft.outputs or len(self.readers[source]) > 1
            if step.op.role is Role.NORM and source not in self.concats and (source < self.draft.input_count or shared):
                seen.append([source])
        return seen

    def _arena(self) -> dict[int, Interval]:
        """An interval for each feature such that every concat is one, in the order of its parts."""
        after: dict[int, int] = {}
        before: dict[int, int] = {}
        known: dict[int, None] = {}
        for leaves in self.features:
            if len(set(leaves)) < len(leaves):
                raise _NotFusedError("a concat holds one feature twice")
            known.update(dict.fromkeys(leaves))
            for left, right in pairwise(leaves):
                if after.setdefault(left, right) != right or before.setdefault(right, left) != left:
                    raise _NotFusedError("its concats join the features in several orders")
        for value in range(self.draft.input_count):
            if value not in known:
                raise _NotFusedError("it reads a tensor from outside that is no feature")
        places: dict[int, Interval] = {}
        start = 0
        for first in known:
            head = first
            while head in before:  # a run of features starts at the one that nothing comes before
                head = before[head]
                if head == first:
                    raise _NotFusedError("its concats join the features in a circle")
            following: int | None = head
            while following is not None and following not in places:
                size = self.draft.extents[following].size
                if len(size) < 3:
                    raise _NotFusedError("a feature is no image")
                places[following] = Interval(start, start + size[1])
                start += size[1]
                following = after.get(following)
        return places

    def _interval(self, value: int) -> Interval:
        if value in self.concats:
            leaves = self.concats[value].leaves
            return Interval(self.places[leaves[0]].start, self.places[leaves[-1]].stop)
        return self.places[value]

    def _reads_arena(self, step: Step) -> bool:
        if step.op.kind is Kind.CONCAT:
            return False
        source = step.inputs[0]
        if source not in self.places and source not in self.concats:
            return False
        if step.op.kind is not Kind.BATCH_NORM:
            raise _NotFusedError(f"{step.name} reads features and is no batch norm")
        return True

    def _chain(self, index: int) -> FusedChain:
        steps = self.draft.steps
        source = self._interval(steps[index].inputs[0])
        stages: list[FusedNorm | PlainStage] = []
        following: int | None = index
        while following is not None:
            index = following
            stage, last = self._stage(index, first=not stages)
            if stages and self._own_weight_gradient(stages[-1], index):
                stage = PlainStage(index, own_weight_gradient=True)
            stages.append(stage)
            following = self._only_reader(steps[last].output)
            if following is not None and following == _pooled_at(stages[0]):
                last, following = following, None
        output = steps[last].output
        place = self.places.get(output)
        if place is None and output not in self.draft.outputs:
            raise _NotFusedError(f"nothing reads {steps[last].name}")
        return FusedChain(source, tuple(stages), place, output, _kept(stages, steps))

    def _stage(self, index: int, first: bool) -> tuple[FusedNorm | PlainStage, int]:
        """The stage that starts with a step, and its last step."""
        steps = self.draft.steps
        step = steps[index]
        if step.op.kind is not Kind.BATCH_NORM:
            return PlainStage(index), index
        dtype = self.draft.extents[step.output].dtype
        if dtype not in _DTYPES:
            raise _NotFusedError(f"there are no kernels for {dtype}")
        last, activation = index, IDENTITY
        following = self._only_reader(step.output)
        if following is not None and steps[following].op.activation is not None:
            activation, last = steps[following].op.activation or IDENTITY, following
            following = self._only_reader(steps[last].output)
        if following is None or steps[following].op.window is None:
            return FusedNorm(index, activation, None, None, dtype), last
        extent = self.draft.extents[steps[following].output]
        pool = self._pooled_behind(following) if first else None
        if pool is not None and extent.dtype in _DTYPES:
            return FusedNorm(index, activation, None, None, extent.dtype, pool), last
        window = set(steps[following].op.window or ())
        made = extent.size[1]
        if extent.dtype not in _DTYPES:
            return FusedNorm(index, activation, None, None, dtype), last
        if first and window == {1} and made <= MAX_MATMUL_CHANNELS:
            return FusedNorm(index, activation, following, None, extent.dtype), following
        if window == {3} and len(extent.size) < 5 and made <= MAX_CONV_CHANNELS:
            return FusedNorm(index, activation, None, following, extent.dtype), following
        return FusedNorm(index, activation, None, None, dtype), last

    def _own_weight_gradient(self, before: FusedNorm | PlainStage, conv: int) -> bool:
        """Whether a convolution that runs by itself has its weight gradient computed from what a norm reads."""
        extent = self.draft.extents[self.draft.steps[conv].output]
        window = set(self.draft.steps[conv].op.window or ())
        if not isinstance(before, FusedNorm) or window != {3} or len(extent.size) > 4:
            return False
        alone = before.matmul is None and before.conv is None and before.pool is None
        return alone and extent.size[1] <= MAX_WEIGHT_CHANNELS and extent.dtype in _DTYPES

    def _pooled_behind(self, conv: int) -> Pooling | None:
        """The pooling that ends a chain behind a convolution, if it can as well go before it."""
        steps, extents = self.draft.steps, self.draft.extents
        following = self._only_reader(steps[conv].output)
        if set(steps[conv].op.window or ()) != {1} or following is None:
            return None
        window, large = steps[following].op.pool, extents[steps[conv].output]
        small = extents[steps[following].output]
        if window is None or len(window) > 2 or not 1 < prod(window) <= MAX_POOL_WINDOW:
            return None
        if any(size % one for size, one in zip(large.size[2:], window, strict=True)) or small.dtype != large.dtype:
            return None
        return Pooling(following, window) if self._only_reader(steps[following].output) is None else None

    def _only_reader(self, value: int) -> int | None:
        """The step that goes on with a value inside its chain; None where the chain ends."""
        readers = self.readers.get(value, [])
        if value in self.places or value in self.draft.outputs:
            if value not in self.places and readers:
                raise _NotFusedError("a value inside a chain is read elsewhere")
            return None
        if len(readers) > 1:
            raise _NotFusedError("a value inside a chain is read twice")
        return readers[0] if readers else None


def _steps_of(stage: FusedNorm | PlainStage) -> tuple[int, ...]:
    if isinstance(stage, PlainStage):
        return (stage.step,)
    pool = None if stage.pool is None else stage.pool.step
    return tuple(step for step in (stage.norm, stage.matmul, stage.conv, pool) if step is not None)


def _pooled_at(stage: FusedNorm | PlainStage) -> int | None:
    """The step whose work a stage does before the convolution that it follows."""
    return stage.pool.step if isinstance(stage, FusedNorm) and stage.pool is not None else None


def _kept(stages: list[FusedNorm | PlainStage], steps: tuple[Step, ...]) -> int | None:
    """At "concat" the result of the first convolution, unless it is the chain's, which lies in the arena or outside."""
    if steps[_steps_of(stages[0])[0]].level == "layer":
        return None
    for index, stage in enumerate(stages[:-1]):
        if any(steps[step].op.kind is Kind.CONVOLUTION for step in _steps_of(stage)):
            return index
    return None

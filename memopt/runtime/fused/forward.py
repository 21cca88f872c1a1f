"""Forward of a fused region: features and their statistics into the arena, one chain after another."""

import torch

from memopt.ir import FusedChain, FusedNorm, FusedPlan, Interval, Kind, OpSpec, PlainStage
from memopt.runtime.binding import Tensors
from memopt.runtime.fused.call import Call, Norm, size_made
from memopt.runtime.fused.running_statistics import RunningStatistics
from memopt.runtime.fused.support import allows_tf32
from memopt.runtime.kernels import tiles
from memopt.runtime.kernels.merge_moments import merge_moments
from memopt.runtime.kernels.moments import moments, part_rows
from memopt.runtime.memory_format import CHANNELS_LAST, suggested_format
from memopt.runtime.ops.batch_norm import BatchNorm
from memopt.runtime.rows import empty_arena, empty_pair, image_of, rows_of, zero_pair

Pair = tuple[torch.Tensor, torch.Tensor]


class Forward:
    """One run; leaves in `call` what backward needs."""

    def __init__(self, call: Call, inputs: Tensors, parameters: Tensors) -> None:
        self.call, self.inputs, self.parameters = call, inputs, parameters
        plan, first = call.plan, inputs[0]
        call.size = first.shape
        call.formats = tuple(map(suggested_format, inputs))
        call.allow_tf32 = allows_tf32(first.device)
        positions = first.numel() // first.shape[1]
        self.arena = empty_arena(positions, plan.channels, plan.dtype, first.device)
        # Zeros where nothing is measured: backward takes the distance from the mean all the same.
        self.mean, self.variance = zero_pair(plan.channels, first.device)
        self.running = RunningStatistics()
        self.measured = any(isinstance(op, BatchNorm) and op.training for op in call.binding.ops)

    def run(self) -> dict[int, torch.Tensor]:
        """The values that leave the region."""
        call, plan = self.call, self.call.plan
        for number, place in plan.placed:
            x = self.inputs[number]
            part = self._part(place)
            image_of(part, x.shape).copy_(x)
            if self.measured:
                self._measure(part, None, *self._statistics(place))
        call.save(self.arena, self.mean)
        values: dict[int, torch.Tensor] = {}
        for number, chain in enumerate(plan.chains):
            image, appended = self._chain(number, chain)
            if chain.place is None:
                values[chain.output] = image.contiguous(memory_format=_format_of(plan, chain.output, image))
            elif not appended:
                self._append(rows_of(image), chain.place)
        for output, place in plan.copied.items():
            part = image_of(self._part(place), call.size)
            values[output] = part.clone(memory_format=_format_of(plan, output, part))
        self.running.update()
        return values

    def _chain(self, number: int, chain: FusedChain) -> tuple[torch.Tensor, bool]:
        """A chain's result, and whether it lies in the arena already."""
        call = self.call
        appended = False
        image = image_of(self._part(chain.source), call.size)
        known: Pair | None = self._statistics(chain.source)
        for index, stage in enumerate(chain.stages):
            if isinstance(stage, PlainStage):
                call.binding.count_own_batch(stage.step)
                op, step = call.binding.ops[stage.step], call.plan.steps[stage.step]
                assert op is not None
                if _needs_eagers_layout(step.op):
                    image = image.contiguous(memory_format=_format_of(call.plan, step.output, image))
                image, stash = op.forward(image, call.lay_out(stage.step, image, self.parameters), None)
                place = call.save(*stash)
                call.stash_at[stage.step] = slice(place, place + len(stash))
                known = None
            else:
                x = self._part(chain.source) if index == 0 else rows_of(image)
                norm = self._norm(stage, x, known)
                appended = chain.place is not None and stage is chain.stages[-1] and stage.conv is not None
                if appended:
                    image = self._run_into(stage, norm, x, image.shape, chain.place)
                else:
                    image, known = self._run(stage, norm, x, image.shape, self._normalised_next(chain, index))
            if chain.kept == index:
                call.kept_at[number] = call.save(image)
        return image, appended

    def _norm(self, stage: FusedNorm, x: torch.Tensor, known: Pair | None) -> Norm:
        """A norm with the statistics of x, or its running ones."""
        call = self.call
        call.binding.count_own_batch(stage.norm)
        op = call.norm_op(stage.norm)
        if op.training:
            if known is None:
                known = empty_pair(x.shape[1], x.device)
                self._measure(x, None, *known)
            statistics = known
            self.running.add(op, *statistics, len(x))
        else:
            running_mean, running_var = op.running
            assert running_mean is not None
            assert running_var is not None
            # The buffers may change before backward.
            statistics = (running_mean.float().clone(), running_var.float().clone())
        op.running = (None, None)
        call.statistics_at[stage.norm] = call.save(*statistics)
        return call.norm(stage, *statistics, self.parameters)

    def _run(
        self, stage: FusedNorm, norm: Norm, x: torch.Tensor, size: torch.Size, measure: bool
    ) -> tuple[torch.Tensor, Pair | None]:
        """The stage's result as an image; with `measure`, mean and variance of a convolution's."""
        y = self.call.empty_result(stage, x, self.parameters)
        if not measure or (stage.matmul is None and stage.conv is None):
            self.call.run(stage, norm, self.parameters, x, size, y, None)
            return image_of(y, size_made(stage, size)), None
        mean, variance = empty_pair(y.shape[1], x.device)
        self._run_measured(stage, norm, x, size, y, mean, variance)
        return image_of(y, size), (mean, variance)

    def _run_into(
        self, stage: FusedNorm, norm: Norm, x: torch.Tensor, size: torch.Size, place: Interval | None
    ) -> torch.Tensor:
        """The stage's result where it belongs in the arena."""
        assert place is not None
        y = self._part(place)
        if self.measured:
            self._run_measured(stage, norm, x, size, y, *self._statistics(place))
        else:
            self.call.run(stage, norm, self.parameters, x, size, y, None)
        return image_of(y, size)

    def _run_measured(
        self,
        stage: FusedNorm,
        norm: Norm,
        x: torch.Tensor,
        size: torch.Size,
        y: torch.Tensor,
        mean: torch.Tensor,
        variance: torch.Tensor,
    ) -> None:
        rows = self.call.moment_rows(stage, x, y, size)
        partial = torch.empty(2, y.shape[1], tiles.cdiv(len(x), rows), dtype=torch.float32, device=x.device)
        self.call.run(stage, norm, self.parameters, x, size, y, partial)
        merge_moments(partial, len(x), rows, mean, variance)

    def _normalised_next(self, chain: FusedChain, index: int) -> bool:
        following = chain.stages[index + 1] if index + 1 < len(chain.stages) else None
        return isinstance(following, FusedNorm) and self.call.norm_op(following.norm).training

    def _append(self, feature: torch.Tensor, place: Interval) -> None:
        if self.measured:
            self._measure(feature, self._part(place), *self._statistics(place))
        else:
            self._part(place).copy_(feature)

    def _measure(self, x: torch.Tensor, copy: torch.Tensor | None, mean: torch.Tensor, variance: torch.Tensor) -> None:
        """Mean and variance of the columns of x (P, C), which are also copied where given."""
        rows = part_rows(*x.shape)
        partial = torch.empty(2, x.shape[1], tiles.cdiv(len(x), rows), dtype=torch.float32, device=x.device)
        moments(x, partial, copy)
        merge_moments(partial, len(x), rows, mean, variance)

    def _part(self, place: Interval) -> torch.Tensor:
        return self.arena[:, place.start : place.stop]

    def _statistics(self, place: Interval) -> Pair:
        return self.mean[place.start : place.stop], self.variance[place.start : place.stop]


def _needs_eagers_layout(op: OpSpec) -> bool:
    """Dropout draws its numbers in the order in which a tensor lies. The gradient of an average over windows that are
    padded is wrong in ATen on CUDA where channels lie innermost."""
    return op.kind is Kind.DROPOUT or (op.kind is Kind.AVG_POOL and op.pool is None)


def _format_of(plan: FusedPlan, value: int, image: torch.Tensor) -> torch.memory_format:
    """How a value lies in eager: what the user's code does with it next may depend on that."""
    return CHANNELS_LAST[image.dim()] if value in plan.channels_last else torch.contiguous_format

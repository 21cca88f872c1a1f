"""Backward of a fused region: chains in reverse, the gradients of all features in one arena."""

import torch

from memopt.ir import IDENTITY, FusedChain, FusedNorm, Interval, PlainStage
from memopt.runtime.binding import Tensors
from memopt.runtime.fused.call import Call, Norm, image_size, size_made, window_of
from memopt.runtime.fused.sums import Sums, empty_sums, weight_parts
from memopt.runtime.kernels import norm_act_conv_backward, norm_act_matmul_backward, norm_act_sums
from memopt.runtime.kernels.feature_gradient import feature_gradient
from memopt.runtime.kernels.finish_norm import finish_norm
from memopt.runtime.kernels.language import KINDS
from memopt.runtime.kernels.norm_act_backward import norm_act_backward
from memopt.runtime.memory_format import with_strides_of_ones
from memopt.runtime.rows import empty_pair, empty_rows, image_of, rows_of, zero_arena, zero_pair

Results = dict[int, torch.Tensor]
_Apart = tuple[torch.Tensor, int] | tuple[()]


class Backward:
    """One run over what forward saved."""

    def __init__(self, call: Call, saved: Tensors, needs: tuple[bool, ...]) -> None:
        self.call, self.needs = call, needs
        count = len(call.binding.parameters)
        self.parameters, self.saved = saved[:count], saved[count:]
        self.arena, self.mean = self.saved[:2]
        self.gradient = zero_arena(self.arena)
        self.constant, self.slope = zero_pair(self.arena.shape[1], self.arena.device)
        self.parameter_grads: list[torch.Tensor | None] = [None] * count

    def run(self, grad_outputs: tuple[torch.Tensor | None, ...]) -> tuple[torch.Tensor | None, ...]:
        """Gradients of the inputs, then of the parameters."""
        plan = self.call.plan
        given: dict[int, torch.Tensor] = {}
        places = plan.copied | dict(plan.placed)
        for number, grad in zip((*plan.outputs, *plan.passed_through), grad_outputs, strict=True):
            if grad is not None and number in places:
                self.gradient[:, places[number].start : places[number].stop] += rows_of(grad)
            elif grad is not None:
                given[number] = grad
        for number in reversed(range(len(plan.chains))):
            chain = plan.chains[number]
            if chain.output not in self.call.requires_grad:
                continue
            if chain.place is not None:
                rounded = self._rounds(chain.stages[-1])
                self._chain(number, chain, self._feature(chain.place, rounded), rounded)
            elif chain.output in given:
                self._chain(number, chain, given.pop(chain.output), False)
        inputs: list[torch.Tensor | None] = [None] * plan.input_count
        for number, place in plan.placed:
            if self.needs[number]:
                inputs[number] = self._feature(place, False).contiguous(memory_format=self.call.formats[number])
        return (*inputs, *self.parameter_grads)

    def _rounds(self, stage: FusedNorm | PlainStage) -> bool:
        """Whether a stage uses its gradient in matmuls alone: then whoever writes it rounds it to TF32, once."""
        if not self.call.allow_tf32 or isinstance(stage, PlainStage):
            return False
        step = stage.conv if stage.matmul is None else stage.matmul
        return step is not None and self.call.binding.index[step][1] is None

    def _feature(self, place: Interval, rounded: bool) -> torch.Tensor:
        """The finished gradient of a feature, as an image."""
        channels = slice(place.start, place.stop)
        out = empty_rows(self.arena, place.stop - place.start, self.arena.dtype)
        feature_gradient(
            self.gradient[:, channels],
            self.arena[:, channels],
            self.mean[channels],
            self.constant[channels],
            self.slope[channels],
            rounded,
            out,
        )
        return image_of(out, self.call.size)

    def _chain(self, number: int, chain: FusedChain, grad: torch.Tensor, rounded: bool) -> None:
        results = self._recompute(number, chain)
        apart: _Apart = ()
        for index in reversed(range(len(chain.stages))):
            stage = chain.stages[index]
            if isinstance(stage, PlainStage) and stage.own_weight_gradient:
                x = results[index - 2] if index > 1 else image_of(self._part(chain.source), self.call.size)
                apart = self._weight_apart(stage, chain.stages[index - 1], grad, x)
                grad, rounded = self._plain(stage, grad, x, None), False
            elif isinstance(stage, PlainStage):
                grad, rounded = self._plain(stage, grad, results.get(index - 1), results.get(index)), False
            elif index > 0:
                given, rounded = rounded, self._rounds(chain.stages[index - 1])
                grad = self._dense_norm(stage, rows_of(grad), results[index - 1], given, rounded, apart)
                apart = ()
            else:
                self._arena_norm(stage, rows_of(grad), chain.source, rounded, apart)
            results.pop(index, None)

    def _weight_apart(
        self, stage: PlainStage, before: FusedNorm | PlainStage, grad: torch.Tensor, image: torch.Tensor
    ) -> _Apart:
        """Parts of the weight gradient of a convolution of act(norm(image))."""
        assert isinstance(before, FusedNorm)
        weight_at, _ = self.call.binding.index[stage.step]
        if weight_at is None or ~weight_at not in self.call.requires_grad:
            return ()
        norm, weight = self._norm(before), self.parameters[weight_at]
        return weight_parts(self.call, norm, rows_of(grad), rows_of(image), image.shape, weight), stage.step

    def _recompute(self, number: int, chain: FusedChain) -> Results:
        """Results of stages that the gradients of this chain read, by index."""
        wanted = self.call.wanted(chain)
        results: Results = {}
        if chain.kept is not None:
            results[chain.kept] = self.saved[self.call.kept_at[number]]
        passing: torch.Tensor | None = None
        for index in range(max(wanted, default=-1) + 1):
            if index in results:
                passing = results[index]
                continue
            if chain.kept is not None and index < chain.kept and not any(index <= w < chain.kept for w in wanted):
                continue  # only what was kept is made of it
            passing = self._again(chain, index, passing)
            if index in wanted:
                results[index] = passing
        return results

    def _again(self, chain: FusedChain, index: int, passing: torch.Tensor | None) -> torch.Tensor:
        """A stage's result, as forward computed it."""
        call, stage = self.call, chain.stages[index]
        if isinstance(stage, PlainStage):
            op = call.binding.ops[stage.step]
            assert op is not None
            assert passing is not None
            parameters = call.laid_out(stage.step, self.parameters, self.saved)
            return op.recompute(passing, parameters, self.saved[call.stash_at[stage.step]], None)
        if index == 0:
            x, size = self._part(chain.source), call.size
        else:
            assert passing is not None
            x, size = rows_of(passing), passing.shape
        result = call.empty_result(stage, x, self.parameters)
        call.run(stage, self._norm(stage), self.parameters, x, size, result, None)
        return image_of(result, size_made(stage, size))

    def _part(self, place: Interval) -> torch.Tensor:
        return self.arena[:, place.start : place.stop]

    def _norm(self, stage: FusedNorm) -> Norm:
        place = self.call.statistics_at[stage.norm]
        return self.call.norm(stage, self.saved[place], self.saved[place + 1], self.parameters)

    def _plain(
        self, stage: PlainStage, grad: torch.Tensor, x: torch.Tensor | None, y: torch.Tensor | None
    ) -> torch.Tensor:
        call = self.call
        op, places = call.binding.ops[stage.step], call.binding.index[stage.step]
        assert op is not None
        needs = [True, *(p is not None and ~p in call.requires_grad for p in places)]
        if stage.own_weight_gradient:
            needs[1] = False
        parameters = call.laid_out(stage.step, self.parameters, self.saved)
        stash = self.saved[call.stash_at[stage.step]]
        x_grad, *own = op.backward(grad, x, y, parameters, stash, tuple(needs), False)
        assert x_grad is not None
        for place, gradient in zip(places, own, strict=True):
            if place is not None and gradient is not None:
                # DistributedDataParallel compares all strides, also those that say nothing.
                self._give(place, with_strides_of_ones(gradient, self.parameters[place].stride()))
        return x_grad

    def _dense_norm(
        self,
        stage: FusedNorm,
        dz: torch.Tensor,
        image: torch.Tensor,
        rounded: bool,
        round_to_tf32: bool,
        apart: _Apart,
    ) -> torch.Tensor:
        """Gradient of what a norm inside a chain reads, as an image."""
        x, norm = rows_of(image), self._norm(stage)
        channels = x.shape[1]
        if stage.conv is not None:
            dx = empty_rows(x, channels, x.dtype)
            sums = self._conv(stage, norm, dz, rounded, x, image.shape, dx, False)
            constant, slope = self._finish_alone(stage, norm, sums, len(x))
            norm.activation = KINDS[IDENTITY.name]  # its gradient is in dx
            norm_act_backward(dx, x, *norm.arguments, constant, slope, round_to_tf32, dx)
            return image_of(dx, image.shape)
        sums = Sums(empty_sums(norm_act_sums.part_count(*x.shape), channels, x.device), *apart)
        norm_act_sums.norm_act_sums(dz, x, *norm.arguments, image.shape[-1], [1, 1], sums.norm, None)
        constant, slope = self._finish_alone(stage, norm, sums, len(x))
        dx = empty_rows(x, channels, x.dtype)
        norm_act_backward(dz, x, *norm.arguments, constant, slope, round_to_tf32, dx)
        return image_of(dx, image.shape)

    def _arena_norm(self, stage: FusedNorm, grad: torch.Tensor, source: Interval, rounded: bool, apart: _Apart) -> None:
        """Adds to the gradient arena what a chain's first stage hands back."""
        norm = self._norm(stage)
        channels = slice(source.start, source.stop)
        x, total = self.arena[:, channels], self.gradient[:, channels]
        if stage.matmul is not None:
            sums = self._matmul(stage, norm, grad, rounded, x, total)
        elif stage.conv is not None:
            sums = self._conv(stage, norm, grad, rounded, x, self.call.size, total, True)
        else:
            sums = Sums(empty_sums(norm_act_sums.part_count(*x.shape), x.shape[1], x.device), *apart)
            width, window = self.call.size[-1], window_of(stage)
            norm_act_sums.norm_act_sums(grad, x, *norm.arguments, width, window, sums.norm, total)
        self._finish(stage, norm, sums, len(x), self.constant[channels], self.slope[channels], True)

    def _matmul(
        self, stage: FusedNorm, norm: Norm, dy: torch.Tensor, rounded: bool, x: torch.Tensor, total: torch.Tensor
    ) -> Sums:
        assert stage.matmul is not None
        matrix, _ = self.call.matrix(stage, self.parameters)
        count = norm_act_matmul_backward.part_count(len(x), x.shape[1], len(matrix), dy.element_size())
        sums = empty_sums(count, x.shape[1], x.device)
        parts = torch.empty(count, *matrix.shape, dtype=torch.float32, device=x.device)
        norm_act_matmul_backward.norm_act_matmul_backward(
            dy, x, *norm.arguments, matrix, self.call.allow_tf32, rounded, total, parts, sums
        )
        _, bias_at = self.call.binding.index[stage.matmul]
        if bias_at is not None:
            self._give(bias_at, dy.sum(0, dtype=torch.float32).to(self.parameters[bias_at].dtype))
        return Sums(sums, parts, stage.matmul)

    def _conv(
        self,
        stage: FusedNorm,
        norm: Norm,
        g: torch.Tensor,
        rounded: bool,
        x: torch.Tensor,
        size: tuple[int, ...],
        result: torch.Tensor,
        accumulate: bool,
    ) -> Sums:
        assert stage.conv is not None
        taps, _ = self.call.taps(stage, self.parameters)
        count = norm_act_conv_backward.part_count(len(x), x.shape[1], taps.element_size())
        sums = empty_sums(count, x.shape[1], x.device)
        window, _, columns = taps.shape
        parts = torch.empty(count, window, columns, x.shape[1], dtype=torch.float32, device=x.device)
        image = image_size(size)
        norm_act_conv_backward.norm_act_conv_backward(
            g, x, *norm.arguments, taps, *image, self.call.allow_tf32, rounded, accumulate, result, parts, sums
        )
        _, bias_at = self.call.binding.index[stage.conv]
        if bias_at is not None:
            self._give(bias_at, g.sum(0, dtype=torch.float32).to(self.parameters[bias_at].dtype))
        return Sums(sums, parts, stage.conv)

    def _finish_alone(
        self, stage: FusedNorm, norm: Norm, sums: Sums, positions: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What `norm_act_backward` needs of a norm that alone reads its input."""
        training = self.call.norm_op(stage.norm).training
        channels, device = sums.norm.shape[1], sums.norm.device
        constant, slope = empty_pair(channels, device) if training else zero_pair(channels, device)
        self._finish(stage, norm, sums, positions, constant, slope, False)
        return constant, slope

    def _finish(
        self,
        stage: FusedNorm,
        norm: Norm,
        sums: Sums,
        positions: int,
        constant: torch.Tensor,
        slope: torch.Tensor,
        accumulate: bool,
    ) -> None:
        own = empty_pair(sums.norm.shape[1], sums.norm.device)
        put_off = (constant, slope) if self.call.norm_op(stage.norm).training else (None, None)
        weight_at = None if sums.step is None else self.call.binding.index[sums.step][0]
        gradient = None
        if weight_at is not None and ~weight_at in self.call.requires_grad:
            gradient = torch.empty_like(self.parameters[weight_at])
            self._give(weight_at, gradient)
        finish_norm(
            sums.norm,
            norm.variance,
            norm.weight,
            norm.eps,
            positions,
            accumulate,
            *own,
            *put_off,
            None if gradient is None else sums.weight,
            gradient,
        )
        for place, gradient in zip(self.call.binding.index[stage.norm], own, strict=True):
            if place is not None:
                self._give(place, gradient.to(self.parameters[place].dtype))

    def _give(self, place: int | None, gradient: torch.Tensor | None) -> None:
        if place is not None and gradient is not None and ~place in self.call.requires_grad:
            self.parameter_grads[place] = gradient

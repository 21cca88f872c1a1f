"""Running a region: one autograd function for a whole run of chains.

Note: [Why one function for a block]
A dense block's features are read by every later layer. As one function the block can (1) sum the gradients of its
features itself, in place, in eager's order, in one buffer of the size of the features, where autograd's engine would
hold a full-size tensor per contribution; (2) own its scratch: buffers live from the start of a forward (or backward)
call to its end, so nothing is retained between steps and no other call, model, thread or stream can see them.

Note: [Order of summation]
Autograd's engine runs nodes in the reverse order of their creation, so a value's gradient is the left fold of its
readers' contributions, latest reader first. Backward here walks the steps in the same order and adds in the same
association, at every concat, nested or not: sums are bit-identical for any graph of concats. A value that is also
read after the region is handed through the region (`passed_through`), so that the later readers come first here too.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from memopt.ir import Compute, Gradient, RegionPlan, Slot, Step, region_has_run
from memopt.runtime.binding import Binding, Tensors, device_type, guarded
from memopt.runtime.gradients import GradientSums
from memopt.runtime.memory_format import concat_format, suggested_format
from memopt.runtime.ops import as_joint
from memopt.runtime.scratch import Scratch


def region_callable(plan: RegionPlan, name: str, label: str) -> Callable[[Tensors, tuple[Any, ...]], Tensors]:
    """The function that generated code calls in place of the region's nodes.

    It takes the region's input tensors and, for each step that has any, its operands (a live module, or the tensors
    of a function call), and returns the region's outputs followed by its passed-through inputs.

    Args:
        plan: what to run.
        name: of the function.
        label: what the region is called where its moments are told.
    """
    schedule = _Schedule(plan, label)

    def run(inputs: Tensors, operands: tuple[tuple[Any, ...], ...]) -> Tensors:
        call = _Call(schedule, Binding(plan.steps, operands))
        results: Tensors = _Region.apply(call, *inputs, *call.binding.parameters)  # type: ignore[no-untyped-call]
        return results

    run.__name__ = run.__qualname__ = name
    return run


class _Schedule:
    """A plan with what is looked up at every call computed once."""

    def __init__(self, plan: RegionPlan, label: str) -> None:
        self.plan, self.label = plan, label
        self._gradients: dict[Any, _Wanted] = {}

    def wanted(self, binding: Binding, needs: tuple[bool, ...]) -> "_Wanted":
        """What has a gradient, given which arguments of the autograd function need one."""
        key = (binding.index, needs)
        if key not in self._gradients:
            self._gradients[key] = _Wanted(self.plan, binding, needs)
        return self._gradients[key]


class _Wanted:
    """Which values have a gradient and, for each step, which of its inputs and parameters."""

    def __init__(self, plan: RegionPlan, binding: Binding, needs: tuple[bool, ...]) -> None:
        self.values = values = binding.requires_grad(plan.input_count, needs)
        self.of_step = [
            (*(value in values for value in step.inputs), *(p is not None and ~p in values for p in places))
            for step, places in zip(plan.steps, binding.index, strict=True)
        ]


class _Call:
    """One forward of a region: its bound operations and where each one's stash is saved."""

    def __init__(self, schedule: _Schedule, binding: Binding) -> None:
        self.schedule = schedule
        self.binding = binding
        self.stash_span: dict[int, slice] = {}
        self.wanted: _Wanted
        self.dtypes: dict[int, torch.dtype] = {}


class _Region(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: torch.Tensor) -> Tensors:
        plan = call.schedule.plan
        inputs, parameters = tensors[: plan.input_count], tensors[plan.input_count :]
        values: dict[int, torch.Tensor] = dict(enumerate(inputs))
        call.wanted = call.schedule.wanted(call.binding, ctx.needs_input_grad[1:])
        saved: list[torch.Tensor] = []
        _run_forward(call, parameters, values, saved)
        call.binding.forget_modules()
        kept = [values[number] for number in plan.kept]
        ctx.save_for_backward(*kept, *parameters, *saved)
        ctx.call = call
        ctx.set_materialize_grads(False)
        outputs = [values[number] for number in plan.outputs] + [
            inputs[n].view_as(inputs[n]) for n in plan.passed_through
        ]
        numbers = (*plan.outputs, *plan.passed_through)
        frozen = [t for t, n in zip(outputs, numbers, strict=True) if n not in call.wanted.values]
        ctx.mark_non_differentiable(*frozen)
        region_has_run(call.schedule.label, "forward")
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        with torch.no_grad(), torch.autocast(device_type(grad_outputs), enabled=False):
            gradients = _run_backward(ctx, grad_outputs)
        region_has_run(ctx.call.schedule.label, "backward")
        if torch.is_grad_enabled():  # create_graph=True
            gradients = guarded(gradients)
        return (None, *gradients)


def _run_forward(call: _Call, parameters: Tensors, values: dict[int, torch.Tensor], saved: list[torch.Tensor]) -> None:
    schedule = call.schedule
    scratch = Scratch(schedule.plan.forward_lanes_bytes, values[0])
    call.binding.count_batches()
    call.dtypes = {number: value.dtype for number, value in values.items()}
    for instruction in schedule.plan.forward:
        number = instruction.step
        step, op = schedule.plan.steps[number], call.binding.ops[number]
        if op is None:
            values[step.output] = _concat(step, values, instruction.slot, scratch)
        elif (joint := as_joint(op)) is not None:
            values[step.output] = joint.forward(_inputs(step, values), call.binding.parameters_of(number, parameters))
        else:
            call.binding.count_own_batch(number)
            x = values[step.inputs[0]]
            out = x if step.in_place else _place_for(x, instruction.slot, scratch)
            y, stash = op.forward(x, call.binding.parameters_of(number, parameters), out)
            values[step.output] = y
            call.stash_span[number] = slice(len(saved), len(saved) + len(stash))
            saved.extend(stash)
        call.dtypes[step.output] = values[step.output].dtype
        for dead in instruction.free:
            del values[dead]


def _run_backward(ctx: Any, grad_outputs: tuple[torch.Tensor | None, ...]) -> tuple[torch.Tensor | None, ...]:
    call: _Call = ctx.call
    plan = call.schedule.plan
    saved: Tensors = ctx.saved_tensors
    kept_count, parameter_count = len(plan.kept), len(call.binding.parameters)
    values = dict(zip(plan.kept, saved[:kept_count], strict=True))
    parameters = saved[kept_count : kept_count + parameter_count]
    stashes = saved[kept_count + parameter_count :]
    sums = GradientSums(call.dtypes)
    for number, grad in zip((*plan.outputs, *plan.passed_through), grad_outputs, strict=True):
        if grad is not None:
            sums.add(number, grad, owned=False)
    parameter_grads: list[torch.Tensor | None] = [None] * parameter_count
    scratch = Scratch(plan.backward_lanes_bytes, saved[0])
    for instruction in plan.backward:
        step, op = plan.steps[instruction.step], call.binding.ops[instruction.step]
        if isinstance(instruction, Compute):
            _recompute(call, instruction, values, parameters, stashes, scratch)
        elif step.output in call.wanted.values and (total := sums.take(step.output)) is not None:
            if op is None:
                sums.split(*total, step.inputs, step.widths, call.wanted.values)
            else:
                _differentiate(call, instruction, total, values, parameters, stashes, sums, parameter_grads)
        for dead in instruction.free:
            values.pop(dead, None)
    wanted = ctx.needs_input_grad[1 : 1 + plan.input_count]
    input_grads = tuple(sums.compact(n) if need else None for n, need in enumerate(wanted))
    return (*input_grads, *parameter_grads)


def _recompute(
    call: _Call,
    instruction: Compute,
    values: dict[int, torch.Tensor],
    parameters: Tensors,
    stashes: Tensors,
    scratch: Scratch,
) -> None:
    number = instruction.step
    step, op = call.schedule.plan.steps[number], call.binding.ops[number]
    if op is None:
        values[step.output] = _concat(step, values, instruction.slot, scratch)
        return
    if (joint := as_joint(op)) is not None:
        values[step.output] = joint.recompute(_inputs(step, values), call.binding.parameters_of(number, parameters))
        return
    x = values[step.inputs[0]]
    out = x if step.in_place else _place_for(x, instruction.slot, scratch)
    stash = stashes[call.stash_span[number]]
    values[step.output] = op.recompute(x, call.binding.parameters_of(number, parameters), stash, out)


def _differentiate(
    call: _Call,
    instruction: Gradient,
    total: tuple[torch.Tensor, bool],
    values: dict[int, torch.Tensor],
    parameters: Tensors,
    stashes: Tensors,
    sums: GradientSums,
    parameter_grads: list[torch.Tensor | None],
) -> None:
    number = instruction.step
    step, op = call.schedule.plan.steps[number], call.binding.ops[number]
    assert op is not None
    places = call.binding.index[number]
    needs = call.wanted.of_step[number]
    grad, owned = total
    if (joint := as_joint(op)) is not None:
        params = call.binding.parameters_of(number, parameters)
        gradients = joint.backward(grad, _inputs(step, values), params, needs)
        for value, gradient in zip(step.inputs, gradients, strict=False):
            if gradient is not None:
                sums.add(value, gradient, owned=False)
        _hand_out(places, gradients[len(step.inputs) :], parameter_grads)
        return
    x_grad, *own = op.backward(
        grad,
        values.get(step.inputs[0]),
        values.get(step.output),
        call.binding.parameters_of(number, parameters),
        stashes[call.stash_span[number]],
        needs,
        owned,
    )
    if x_grad is not None and needs[0]:
        sums.add(step.inputs[0], x_grad, owned=owned if x_grad is grad else _is_fresh(x_grad, grad))
    _hand_out(places, own, parameter_grads)


def _inputs(step: Step, values: dict[int, torch.Tensor]) -> Tensors:
    return tuple(values[number] for number in step.inputs)


def _hand_out(
    places: tuple[int | None, ...],
    own: Sequence[torch.Tensor | None],
    parameter_grads: list[torch.Tensor | None],
) -> None:
    for place, gradient in zip(places, own, strict=True):
        if place is not None and gradient is not None:
            parameter_grads[place] = gradient


def _concat(step: Step, values: dict[int, torch.Tensor], slot: Slot | None, scratch: Scratch) -> torch.Tensor:
    parts = [values[n] for n in step.leaves]
    dtype = parts[0].dtype
    for part in parts:
        if part.dtype != dtype:
            dtype = torch.promote_types(dtype, part.dtype)
    if slot is None:
        return torch.cat(parts, 1)
    return torch.cat(parts, 1, out=scratch.view(slot, dtype, concat_format(parts)))


def _place_for(x: torch.Tensor, slot: Slot | None, scratch: Scratch) -> torch.Tensor | None:
    return None if slot is None else scratch.view(slot, x.dtype, suggested_format(x))


def _is_fresh(result: torch.Tensor, grad: torch.Tensor) -> bool:
    """Whether nobody else can hold the memory of `result`, an operation's gradient made from `grad`."""
    return not result._is_view() and result.untyped_storage()._cdata != grad.untyped_storage()._cdata

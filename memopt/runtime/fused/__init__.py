"""Running a region on fused kernels: one autograd function for a whole block, its features in one arena.

Note: [Statistics once]
The batch mean and variance of a channel are the same for every layer that reads it. They are computed when the feature
is written, and every reading norm's running statistics are updated from them at the end of forward.

Note: [Gradients put off]
A norm's data gradient is scale · d, less a part that is, for each channel, affine in the feature. A layer's backward
adds scale · d to the gradient arena and the affine part's two numbers to `constant` and `slope`; they are applied once,
when the gradient of the feature is used, after all its readers. Sums over positions are made in a fixed order.
"""

from collections.abc import Callable
from typing import Any

import torch

from memopt.ir import FusedPlan, region_has_run
from memopt.runtime.binding import Binding, Tensors, device_type, guarded
from memopt.runtime.fused.backward import Backward
from memopt.runtime.fused.call import Call
from memopt.runtime.fused.forward import Forward
from memopt.runtime.fused.tapes import ForwardTape, Tapes, running_statistics


def fused_callable(plan: FusedPlan, name: str, label: str) -> Callable[[Tensors, tuple[Any, ...]], Tensors]:
    """The function that generated code calls in place of the region's nodes, as `region_callable` makes one."""

    tapes = Tapes(plan)

    def run(inputs: Tensors, operands: tuple[tuple[Any, ...], ...]) -> Tensors:
        call = Call(plan, Binding(plan.steps, operands))
        arguments = (*inputs, *call.binding.parameters)
        results: Tensors = _FusedRegion.apply(label, tapes, call, *arguments)  # type: ignore[no-untyped-call]
        return results

    run.__name__ = run.__qualname__ = name
    return run


class _FusedRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, label: str, tapes: Tapes, call: Call, *tensors: torch.Tensor) -> Tensors:
        plan, needs = call.plan, ctx.needs_input_grad[3:]
        inputs, parameters = tensors[: plan.input_count], tensors[plan.input_count :]
        call.requires_grad = call.binding.requires_grad(plan.input_count, needs)
        call.binding.count_batches()
        running = running_statistics(call)
        tape = tapes.find(call, tensors, running, needs)
        if tape is None:
            values, saved = Forward(call, inputs, parameters).run(), tuple(call.saved)
            call.binding.forget_modules()
            call.saved = []
        else:
            values, saved = tape.play(tensors, running)
        ctx.save_for_backward(*parameters, *saved)
        ctx.run, ctx.label = call if tape is None else tape, label
        ctx.set_materialize_grads(False)
        outputs = [values[n] for n in plan.outputs] + [inputs[n].view_as(inputs[n]) for n in plan.passed_through]
        numbers = (*plan.outputs, *plan.passed_through)
        frozen = [t for t, n in zip(outputs, numbers, strict=True) if n not in call.requires_grad]
        ctx.mark_non_differentiable(*frozen)
        region_has_run(label, "forward")
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        run: Call | ForwardTape = ctx.run
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad[3:]
        with torch.no_grad(), torch.autocast(device_type(grad_outputs), enabled=False):
            if isinstance(run, ForwardTape):
                gradients = run.backward(saved, grad_outputs, needs)
            else:
                gradients = Backward(run, saved, needs).run(grad_outputs)
        region_has_run(ctx.label, "backward")
        if torch.is_grad_enabled():  # create_graph=True
            gradients = guarded(gradients)
        return (None, None, None, *gradients)

"""The tapes of one region: its forward and backward written down once for each kind of call, then played."""

import threading
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from memopt.ir import FusedPlan
from memopt.runtime.binding import Tensors
from memopt.runtime.fused.backward import Backward
from memopt.runtime.fused.call import Call
from memopt.runtime.fused.forward import Forward
from memopt.runtime.fused.support import allows_tf32
from memopt.runtime.memory_format import with_strides_of_ones
from memopt.runtime.ops.batch_norm import BatchNorm
from memopt.runtime.tape import NotTapedError, Tape, described, record

Key = tuple[Any, ...]
Gradients = tuple[torch.Tensor | None, ...]


class Tapes:
    """Finds the tape for a call, or makes it.

    Args:
        plan: of the region.
    """

    def __init__(self, plan: FusedPlan) -> None:
        self._plan = plan
        self._known: dict[Key, ForwardTape | None] = {}
        self._lock = threading.Lock()

    def find(self, call: Call, tensors: Tensors, running: Tensors, needs: tuple[bool, ...]) -> "ForwardTape | None":
        """The tape for a call with these inputs and parameters; None where it has to run step by step."""
        if call.binding.depends_on_counters:  # whose values no tape knows
            return None
        key = _forward_key(tensors, running, needs)
        with self._lock:
            if key not in self._known:
                try:
                    self._known[key] = ForwardTape(self._plan, call, tensors, running, needs)
                except NotTapedError:
                    self._known[key] = None
            return self._known[key]


class ForwardTape:
    """Forward of one kind of call, and its backwards.

    Attributes:
        call: what a backward needs to know of any such call; it holds no tensor with data.
    """

    def __init__(
        self, plan: FusedPlan, call: Call, tensors: Tensors, running: Tensors, needs: tuple[bool, ...]
    ) -> None:
        self._plan, self.call = plan, call
        self._tape = self._record(tensors, running)
        self._backwards: dict[Key, Tape | None] = {}
        self._lock = threading.Lock()
        self._needs = needs
        self._reserve_bytes: int | None = None

    def play(self, tensors: Tensors, running: Tensors) -> tuple[dict[int, torch.Tensor], Tensors]:
        """Values that leave the region, and buffers to save for backward."""
        made, kept = self._tape.play([*tensors, *dict.fromkeys(running)])
        pairs = zip(self._plan.outputs, made, strict=True)
        outputs = {number: tensor for number, tensor in pairs if tensor is not None}
        self._reserve(outputs, tensors, kept)
        return outputs, tuple(kept)

    def backward(self, saved: Tensors, grad_outputs: Gradients, needs: tuple[bool, ...]) -> Gradients:
        """Gradients of the inputs, then of the parameters."""
        count = len(self.call.binding.parameters)
        grad_outputs = self._as_reserved(grad_outputs)
        tape = self._backward_tape(grad_outputs, saved[:count], saved[count:], needs)
        if tape is None:
            kept = self._tape.saved(list(saved[count:]))
            return Backward(self.call, (*saved[:count], *kept), needs).run(grad_outputs)
        externals = [*(grad for grad in grad_outputs if grad is not None), *saved]
        return tuple(tape.play(externals)[0])

    def _record(self, tensors: Tensors, running: Tensors) -> Tape:
        call, count = self.call, self._plan.input_count
        norms = [op for op in call.binding.ops if isinstance(op, BatchNorm)]
        buffers, parameters = [op.running for op in norms], call.binding.parameters
        once = {id(buffer): buffer for buffer in running}

        def run(fakes: list[torch.Tensor]) -> tuple[list[torch.Tensor | None], list[torch.Tensor]]:
            inputs, call.binding.parameters = tuple(fakes[:count]), tuple(fakes[count : len(tensors)])
            stand_in = dict(zip(once, fakes[len(tensors) :], strict=True))
            for op, (mean, var) in zip(norms, buffers, strict=True):
                op.running = (
                    None if mean is None else stand_in[id(mean)],
                    None if var is None else stand_in[id(var)],
                )
            values = Forward(call, inputs, call.binding.parameters).run()
            return [values[number] for number in self._plan.outputs], call.saved

        try:
            recording = record(run, [described(t) for t in (*tensors, *once.values())])
        except NotTapedError:
            for op, pair in zip(norms, buffers, strict=True):
                op.running = pair
            call.binding.parameters = parameters
            raise
        finally:
            call.saved = []
        call.binding.forget_modules()
        return Tape(recording)

    def _backward_tape(
        self, grad_outputs: Gradients, parameters: Tensors, kept: Tensors, needs: tuple[bool, ...]
    ) -> Tape | None:
        saved = (*parameters, *kept)
        everything = (*(grad for grad in grad_outputs if grad is not None), *saved)
        absent = tuple(grad is None for grad in grad_outputs)
        key = (_descriptions(everything), absent, needs, _alignment(everything))
        with self._lock:
            if key not in self._backwards:
                given = [None if grad is None else described(grad) for grad in grad_outputs]
                try:
                    self._backwards[key] = self._record_backward(given, len(parameters), saved, needs)
                except NotTapedError:
                    self._backwards[key] = None
            return self._backwards[key]

    def _record_backward(self, given: list[Any], parameter_count: int, saved: Tensors, needs: tuple[bool, ...]) -> Tape:
        present = [description for description in given if description is not None]

        def run(fakes: list[torch.Tensor]) -> tuple[Gradients, tuple[torch.Tensor, ...]]:
            grads = iter(fakes)
            grad_outputs = tuple(None if description is None else next(grads) for description in given)
            parameters = fakes[len(present) : len(present) + parameter_count]
            kept = self._tape.saved(fakes[len(present) + parameter_count :])
            return Backward(self.call, (*parameters, *kept), needs).run(grad_outputs), ()

        return Tape(record(run, [*present, *map(described, saved)]))

    def _as_reserved(self, grad_outputs: Gradients) -> Gradients:
        """Gradients with strides like those that backward was recorded with: a loss makes (C, 1, 1, 1) of what a head
        of one position hands out as (C, 1, C, C), and a second recording would be made for nothing."""
        passed_through = grad_outputs[len(self._tape.strides) :]
        pairs = zip(grad_outputs, self._tape.strides, strict=False)
        handed_out = [g if g is None or s is None else with_strides_of_ones(g, s) for g, s in pairs]
        return *handed_out, *passed_through

    def _reserve(self, outputs: dict[int, torch.Tensor], tensors: Tensors, kept: list[torch.Tensor]) -> None:
        """Ask for backward's scratch and give it back: the allocator puts what comes in between into it instead of
        beside it, and reserves less in all."""
        if self._reserve_bytes is None:
            plan, needed = self._plan, self.call.requires_grad
            grads = [outputs[n] if n in needed else None for n in plan.outputs]
            grads += [tensors[n] if n in needed else None for n in plan.passed_through]
            parameters = tensors[plan.input_count :]
            tape = self._backward_tape(tuple(grads), parameters, tuple(kept), self._needs) if any(self._needs) else None
            self._reserve_bytes = 0 if tape is None else tape.scratch_bytes
            if tape is not None and tensors[0].is_cuda and not isinstance(tensors[0], FakeTensor):
                tape.compile_soon(tensors[0].device)
        if self._reserve_bytes:
            tensors[0].new_empty(self._reserve_bytes, dtype=torch.uint8)


def running_statistics(call: Call) -> Tensors:
    """Running statistics of every norm, in order, repeated where norms share them."""
    norms = [op for op in call.binding.ops if isinstance(op, BatchNorm)]
    return tuple(buffer for op in norms for buffer in op.running if buffer is not None)


def _forward_key(tensors: Tensors, running: Tensors, needs: tuple[bool, ...]) -> Key:
    device = tensors[0].device
    first: dict[int, int] = {}
    shared = tuple(first.setdefault(id(buffer), n) for n, buffer in enumerate(running))
    autocast = torch.is_autocast_enabled(device.type)
    cast = torch.get_autocast_dtype(device.type) if autocast else None
    everything = (*tensors, *running)
    return (_descriptions(everything), shared, needs, allows_tf32(device), cast, _alignment(everything))


def _descriptions(tensors: Tensors) -> Key:
    """As `described`, of many tensors on one device: this runs at every call."""
    sizes, strides = map(torch.Tensor.size, tensors), map(torch.Tensor.stride, tensors)
    return tensors[0].device, tuple([t.dtype for t in tensors]), tuple(sizes), tuple(strides)


def _alignment(tensors: Tensors) -> tuple[int, ...] | None:
    """Which addresses no vector can be loaded from: kernels are compiled with or without. None where all can."""
    if not tensors[0].is_cuda or isinstance(tensors[0], FakeTensor):
        return None
    odd = tuple(n for n, tensor in enumerate(tensors) if tensor.data_ptr() % 16)
    return odd or None

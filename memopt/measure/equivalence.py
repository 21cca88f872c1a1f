"""Whether a rewritten model trains as the untouched one does, bit for bit."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from memopt.ir import flattened
from memopt.measure.bits import relative_error, same_bits
from memopt.measure.determinism import deterministic
from memopt.measure.duplicate import duplicate
from memopt.measure.step import Inputs, TrainingStep, forward_and_loss, seeded

Tensors = Mapping[str, torch.Tensor | None]

_AFTER_STEP = " after the step"


@dataclass(frozen=True, slots=True)
class Equivalence:
    """Result of training two models side by side.

    Attributes:
        numerics: what was promised; "exact" promises equal bits, "fast" an error like eager's own (`bound`).
        outputs_equal: every output of every step has equal bits.
        gradients_equal: so have the gradients of parameters and inputs (and whether there is one), and the
            parameters after each optimiser step.
        buffers_equal: so have the buffers after each step.
        max_gradient_error: largest L2 norm of (gradient - eager's) over that of eager's, over parameters and
            steps; 0.0 where the bits are equal, infinite where only one is finite or there.
        passed: the promise was kept.
        skipped: what eager itself did not repeat from run to run, which was therefore not compared.
        steps: optimiser steps trained.
        differing: names of what was compared and differs.
    """

    numerics: Literal["exact", "fast"]
    outputs_equal: bool
    gradients_equal: bool
    buffers_equal: bool
    max_gradient_error: float
    passed: bool
    skipped: tuple[str, ...]
    steps: int
    differing: tuple[str, ...] = ()


def check_equivalence(
    naive_model: nn.Module,
    rewritten_model: nn.Module,
    batches: Sequence[Inputs],
    *,
    steps: int = 3,
    amp: torch.dtype | None = None,
    seed: int = 0,
    repeat_eager: bool | None = None,
) -> Equivalence:
    """Train both models from one state with the same random numbers; compare each step bit for bit.

    Runs under deterministic algorithms with SGD and momentum, gradients of floating-point inputs included in
    every second step (users train without, so the first step is without). Where eager itself does not repeat
    everything, both train again with the pooling backwards that torch lists as non-deterministic run on the CPU;
    what eager even then does not repeat is not compared but listed, and the check fails if that is more than such a
    pooling accounts for.

    Args:
        naive_model: the untouched model.
        rewritten_model: the same model after memopt; same names of parameters and buffers, same device.
        batches: positional arguments of `forward`, on the models' device; step i takes batch i modulo their
            number.
        steps: how many optimiser steps.
        amp: autocast dtype or None.
        seed: of the random numbers.
        repeat_eager: train a copy of the naive model too, to see what eager repeats; None does on CUDA only,
            since on a CPU eager repeats itself.

    Both models' parameters, buffers and gradients are put back before returning, and so are the random
    generators and torch's determinism settings.

    Raises:
        ValueError: the two models do not have the same parameters and buffers.
        StepError: nothing to train, or an output that no loss can be made from.
    """
    repeats = _device_of(naive_model).type == "cuda" if repeat_eager is None else repeat_eager

    def attempt(pooling_on_cpu: bool) -> Equivalence:
        return _train_side_by_side(naive_model, rewritten_model, batches, steps, amp, seed, repeats, pooling_on_cpu)

    result = attempt(pooling_on_cpu=False)
    # One atomic addition in a pooling backward leaves nothing upstream of it to compare: give that a fixed order.
    return attempt(pooling_on_cpu=True) if result.skipped else result


def _train_side_by_side(
    naive_model: nn.Module,
    rewritten_model: nn.Module,
    batches: Sequence[Inputs],
    steps: int,
    amp: torch.dtype | None,
    seed: int,
    repeats: bool,
    pooling_on_cpu: bool,
) -> Equivalence:
    device = _device_of(naive_model)
    tally = _Tally()
    with ExitStack() as stack:
        stack.enter_context(put_back(naive_model))
        stack.enter_context(put_back(rewritten_model))
        stack.enter_context(seeded(seed, device))
        seen = stack.enter_context(deterministic(pooling_on_cpu=pooling_on_cpu))
        copy_state(naive_model, rewritten_model)
        twins = [duplicate(naive_model)] if repeats else []
        eager, *again, rewritten = (_Trainee(model, amp, device) for model in (naive_model, *twins, rewritten_model))
        for number in range(steps):
            batch = batches[number % len(batches)]
            reference = eager.advance(batch, number)
            repeated = [twin.advance(batch, number) for twin in again]
            tally.add(reference, repeated, rewritten.advance(batch, number))
            for trainee in (*again, rewritten) if tally.skipped else ():
                # Else one gradient that eager does not repeat would spoil every later step.
                trainee.continue_from(eager)
    return tally.result(steps, excused=seen.pooling_ran)


def _device_of(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


@dataclass(frozen=True, slots=True)
class _Observed:
    """Everything that one training step left, by name."""

    outputs: Tensors
    gradients: Tensors
    buffers: Tensors
    parameter_gradients: Tensors


class _Trainee:
    """A model in training with a random stream of its own, so that several can take turns."""

    def __init__(self, model: nn.Module, amp: torch.dtype | None, device: torch.device) -> None:
        self._step = TrainingStep(model, (), amp)
        self._step.clear()
        self._device = device
        self._random_state = _random_state(device)

    def advance(self, batch: Inputs, number: int) -> _Observed:
        """Train one step. The tensors returned are the live ones: compare them before the next step."""
        _set_random_state(self._random_state, self._device)
        step = self._step
        step.clear()
        leaves, inputs = _fresh_inputs(batch, wants_gradient=number % 2 == 1)
        outputs, loss = forward_and_loss(step.model, inputs, step.amp)
        loss.backward()  # type: ignore[no-untyped-call]
        step.update()
        self._random_state = _random_state(self._device)
        parameters = dict(step.model.named_parameters())
        gradients = {f"gradient of {name}": parameter.grad for name, parameter in parameters.items()}
        return _Observed(
            outputs={f"output {i}": t.detach() for i, t in enumerate(_tensors(outputs))},
            gradients={
                **gradients,
                **{f"gradient of input {i}": leaf.grad for i, leaf in enumerate(leaves)},
                **{f"{name}{_AFTER_STEP}": parameter.detach() for name, parameter in parameters.items()},
            },
            buffers={f"buffer {name}": buffer for name, buffer in step.model.named_buffers()},
            parameter_gradients=gradients,
        )

    def continue_from(self, other: "_Trainee") -> None:
        """Take over another's parameters, buffers and momentum."""
        copy_state(other._step.model, self._step.model)
        self._step.optimizer.load_state_dict(copy.deepcopy(other._step.optimizer.state_dict()))


class _Tally:
    """Adds up the comparisons of all steps."""

    def __init__(self) -> None:
        self.skipped: dict[str, None] = {}
        self.skipped_beyond_gradients = False
        self.differing: dict[str, dict[str, None]] = {"outputs": {}, "gradients": {}, "buffers": {}}
        self.max_gradient_error = 0.0

    def add(self, eager: _Observed, repeated: Sequence[_Observed], rewritten: _Observed) -> None:
        for kind, differing in self.differing.items():
            reference = getattr(eager, kind)
            for again in repeated:
                unrepeated = _differing(reference, getattr(again, kind))
                self.skipped.update(dict.fromkeys(unrepeated))
                self.skipped_beyond_gradients |= kind != "gradients" and bool(unrepeated)
            names = [name for name in _differing(reference, getattr(rewritten, kind)) if not self._skips(name)]
            differing.update(dict.fromkeys(names))
        for name in eager.parameter_gradients.keys() - self.skipped.keys():
            error = relative_error(eager.parameter_gradients[name], rewritten.parameter_gradients.get(name))
            self.max_gradient_error = max(self.max_gradient_error, error)

    def _skips(self, name: str) -> bool:
        # A small difference of the gradient may be rounded away in one parameter and not in another.
        gradient = f"gradient of {name.removesuffix(_AFTER_STEP)}" if name.endswith(_AFTER_STEP) else name
        return name in self.skipped or gradient in self.skipped

    def result(self, steps: int, *, excused: bool) -> Equivalence:
        differing = tuple(name for names in self.differing.values() for name in names)
        skipping_is_fine = not self.skipped or (excused and not self.skipped_beyond_gradients)
        return Equivalence(
            numerics="exact",
            outputs_equal=not self.differing["outputs"],
            gradients_equal=not self.differing["gradients"],
            buffers_equal=not self.differing["buffers"],
            max_gradient_error=self.max_gradient_error,
            passed=not differing and skipping_is_fine,
            skipped=tuple(self.skipped),
            steps=steps,
            differing=differing,
        )


@contextmanager
def put_back(model: nn.Module) -> Iterator[None]:
    """Start with gradients None; restore parameters, buffers and gradients afterwards."""
    state = _state(model)
    before = {name: torch.empty_like(tensor, requires_grad=False) for name, tensor in state.items()}
    _copy_all(list(state.values()), list(before.values()))
    gradients = [(tensor, tensor.grad) for tensor in state.values() if isinstance(tensor, nn.Parameter)]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        now = _state(model)
        _copy_all([before[name] for name in now], list(now.values()))
        for parameter, gradient in gradients:
            parameter.grad = gradient


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    # Not state_dict: it leaves out the buffers that are not saved.
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def copy_state(source: nn.Module, destination: nn.Module) -> None:
    """Copy parameters and buffers.

    Raises:
        ValueError: the two do not have the same ones.
    """
    wanted, present = _state(source), _state(destination)
    if wanted.keys() != present.keys():
        names = ", ".join(sorted(wanted.keys() ^ present.keys())[:5])
        raise ValueError(f"The two models do not have the same parameters and buffers: {names}. Compare copies of one.")
    _copy_all([wanted[name] for name in present], list(present.values()))


@torch.no_grad()
def _copy_all(sources: list[torch.Tensor], destinations: list[torch.Tensor]) -> None:
    """One operator for all tensors: deep networks have thousands, and each call its price."""
    if destinations:
        torch._foreach_copy_(destinations, sources)


def _fresh_inputs(batch: Inputs, *, wants_gradient: bool) -> tuple[list[torch.Tensor], Inputs]:
    """Leaves to read gradients from, and the inputs made from them."""
    leaves: list[torch.Tensor] = []

    def fresh(tensor: torch.Tensor) -> torch.Tensor:
        leaf = tensor.detach().clone()
        if wants_gradient and leaf.is_floating_point():
            leaves.append(leaf.requires_grad_())
            # Models may write into their input, which autograd forbids on a leaf.
            return leaf.clone()
        return leaf

    inputs: Inputs = tree_map_only(torch.Tensor, fresh, batch)
    return leaves, inputs


def _tensors(outputs: Any) -> list[torch.Tensor]:
    return [leaf for leaf in flattened(outputs)[0] if isinstance(leaf, torch.Tensor)]


def _differing(reference: Tensors, candidate: Tensors) -> list[str]:
    names = dict.fromkeys([*reference, *candidate])
    return [
        name
        for name in names
        if name not in reference or name not in candidate or not same_bits(reference[name], candidate[name])
    ]


def _random_state(device: torch.device) -> tuple[torch.Tensor, ...]:
    cuda = (torch.cuda.get_rng_state(device),) if device.type == "cuda" else ()
    return (torch.get_rng_state(), *cuda)


def _set_random_state(state: tuple[torch.Tensor, ...], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    for cuda in state[1:]:
        torch.cuda.set_rng_state(cuda, device)

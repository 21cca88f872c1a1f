"""What a training step makes of a model: outputs, gradients and buffers."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from memopt.ir import flattened
from memopt.measure.draws import SameDraws
from memopt.measure.equivalence import put_back
from memopt.measure.step import Inputs, forward_and_loss, seeded


class Trained:
    """Outputs, gradients and buffers of one training step, and none of its memory."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        amp: torch.dtype | None,
        seed: int,
        draws: SameDraws | None,
        shake: int = 0,
    ) -> None:
        device = next(model.parameters()).device
        with put_back(model), _shaken(model, shake, device), seeded(seed, device):
            with _under(draws):
                outputs, loss = forward_and_loss(model, inputs, amp)
            # The backward of a concat is an operator for each of its parts: a mode is slow where it has nothing to do.
            with _under(draws if draws is not None and draws.any else None):
                loss.backward()  # type: ignore[no-untyped-call]
            self.outputs = [_wide(t) for t in flattened(outputs)[0] if isinstance(t, torch.Tensor)]
            # No copies, `put_back` leaves them to us; and not widened before they are compared: they are large.
            self.gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            self.buffers = {n: _wide(b) for n, b in model.named_buffers()}


@contextmanager
def _shaken(model: nn.Module, shake: int, device: torch.device) -> Iterator[None]:
    """With every weight off by up to half a rounding, for whom puts them back."""
    if shake:
        with seeded(shake, device), torch.no_grad():
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    half = torch.finfo(parameter.dtype).eps / 2
                    parameter.mul_(1.0 + torch.empty_like(parameter).uniform_(-half, half))
    yield


def _under(mode: Any) -> Any:
    return nullcontext() if mode is None else mode


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to(torch.float64, copy=True)

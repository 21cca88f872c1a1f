"""One training step as users write it: forward, loss, backward, SGD with momentum."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map_only

from memopt.ir import flattened

Inputs = tuple[Any, ...]
MakeModel = Callable[[], nn.Module]
ModelFunction = Callable[[nn.Module], nn.Module]

LEARNING_RATE = 0.01
MOMENTUM = 0.9


class StepError(ValueError):
    """A model that no training step can be made of: nothing to train, or nothing to make a loss from."""


class TrainingStep:
    """A model, its inputs and its optimiser, ready to run one step after another.

    Args:
        model: any module with at least one parameter that requires a gradient.
        inputs: positional arguments of `forward`; tensors on the model's device.
        amp: autocast dtype of the forward and the loss; None runs without autocast. Gradients are not scaled:
            that changes no memory.

    Raises:
        StepError: no parameter requires a gradient.
    """

    def __init__(self, model: nn.Module, inputs: Inputs, amp: torch.dtype | None = None) -> None:
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not parameters:
            raise StepError(
                f"{type(model).__name__} has no parameter that requires a gradient, so there is no training "
                "step to run. Unfreeze at least one."
            )
        self.model = model
        self.inputs = inputs
        self.amp = amp
        self.optimizer = torch.optim.SGD(parameters, lr=LEARNING_RATE, momentum=MOMENTUM)

    def forward(self) -> torch.Tensor:
        """Forward and loss: a scalar tensor that holds the graph."""
        return forward_and_loss(self.model, self.inputs, self.amp)[1]

    def update(self) -> None:
        """The optimiser's step."""
        self.optimizer.step()

    def clear(self) -> None:
        """Drop every gradient (None, not zero)."""
        self.model.zero_grad(set_to_none=True)

    def run(self) -> None:
        """Forward, loss, backward, update, gradients dropped."""
        self.forward().backward()  # type: ignore[no-untyped-call]
        self.update()
        self.clear()


def forward_and_loss(model: nn.Module, inputs: Inputs, amp: torch.dtype | None = None) -> tuple[Any, torch.Tensor]:
    """What the model returns and the scalar loss made from it, under autocast when `amp` is a dtype.

    Raises:
        StepError: the output holds nothing that a loss can be made from.
    """
    with autocast(model, amp):
        outputs = model(*inputs)
        return outputs, loss_of(outputs)


def autocast(model: nn.Module, amp: torch.dtype | None) -> AbstractContextManager[Any]:
    """Autocast for the device of the model's first parameter; nothing when `amp` is None."""
    if amp is None:
        return nullcontext()
    device_type = next((parameter.device.type for parameter in model.parameters()), "cpu")
    return torch.autocast(device_type, dtype=amp)


def loss_of(outputs: Any) -> torch.Tensor:
    """Cross-entropy for floating logits (N, classes), else the sum of the means of all floating tensors.

    Args:
        outputs: what the model returned: a tensor or any nesting of tuples, lists and dicts of tensors.

    Raises:
        StepError: no floating tensor in `outputs` depends on a parameter.
    """
    floating = [leaf for leaf in flattened(outputs)[0] if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
    if not any(tensor.requires_grad for tensor in floating):
        raise StepError(
            "The model's output holds no floating-point tensor that depends on a parameter: no loss can be "
            "made from it. Return one from forward."
        )
    if isinstance(outputs, torch.Tensor) and outputs.dim() == 2 and outputs.shape[1] > 1:
        return F.cross_entropy(_at_least_float32(outputs), _class_ids(outputs))
    return torch.stack([_at_least_float32(tensor).mean() for tensor in floating]).sum()


def on_device(inputs: Inputs, device: torch.device) -> Inputs:
    """The same inputs with every tensor on `device`."""
    moved: Inputs = tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), inputs)
    return moved


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers from `seed` inside; the caller's generators (CPU and `device`) are left as they were."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        # Not torch.manual_seed: it seeds the generators of every GPU, also those that CUDA has yet to make.
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def _at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _class_ids(logits: torch.Tensor) -> torch.Tensor:
    # A fixed scatter over the classes (Knuth's multiplicative hash) that draws from no generator: the models'
    # own random stream (dropout) must not depend on how the loss was made.
    positions = torch.arange(logits.shape[0], device=logits.device)
    return (positions * 2654435761) % 2**32 % logits.shape[1]

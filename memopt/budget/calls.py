"""A memory budget's plan for one call of a user's model, wherever the model is."""

import copy
import inspect
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from memopt.budget.planner import Rewriting, plan_within
from memopt.errors import BudgetError
from memopt.ir import MemoryPlan, waits_for_others


def plan_call(
    budget_bytes: int,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    rewriting: Rewriting,
) -> MemoryPlan:
    """The levels that take least time for a call of a model, in its mode and in the autocast that is in force.

    The model is copied without its data; nothing is computed and no state of the user's changes.

    Args:
        budget_bytes, rewriting: as `plan_within` takes them.
        model: on any device.
        args, kwargs: of the call.

    Raises:
        BudgetError: there is no plan; the step waits for other processes, say.
    """
    waits = waits_for_others(model)
    if waits is not None:
        raise BudgetError(f"{waits} waits for other processes, so no step can be predicted. Choose Config.recompute.")
    try:
        inputs = inspect.signature(model.forward).bind(*args, **kwargs)
    except (TypeError, ValueError) as error:
        raise BudgetError(f"The inputs of {type(model).__name__} cannot be put in order: {error}.") from error
    if inputs.kwargs:
        raise BudgetError(f"{', '.join(inputs.kwargs)} can only be passed by name, so no step can be predicted.")
    device_type = next((p.device.type for p in model.parameters()), "cpu")
    amp = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    with _disable_current_modes(), torch.autocast(device_type, enabled=False), torch.enable_grad():
        return plan_within(
            budget_bytes,
            lambda: rewriting.remove(_without_data(model)),
            inputs.args,
            rewriting,
            amp=amp,
        )


def _without_data(model: nn.Module) -> nn.Module:
    """A copy on the CPU whose parameters and buffers have their shapes and strides and no values."""
    memo: dict[int, torch.Tensor] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
    return copy.deepcopy(model, memo)

"""What FSDP2 (`fully_shard`) makes of a module: pieces of parameters between calls, casts around calls."""

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True, slots=True)
class ShardingPolicy:
    """The casts that FSDP2's hooks make.

    Attributes:
        parameters: dtype of the whole parameters during forward; None: as they are kept.
        inputs: dtype that forward's floating-point inputs are cast to; None: not cast.
        outputs: the same of its outputs.
    """

    parameters: torch.dtype | None
    inputs: torch.dtype | None
    outputs: torch.dtype | None


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether `fully_shard` was called on this very module."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # not imported: then nobody can have called it
    return hasattr(fsdp, "FSDPModule") and isinstance(module, fsdp.FSDPModule)


def sharding_policy(module: nn.Module) -> ShardingPolicy | None:
    """How FSDP2 casts for a module; None where it does not manage the module."""
    if not is_fully_sharded(module):
        return None
    policy: Any = module._get_fsdp_state()._mp_policy  # type: ignore[operator]
    inputs = policy.param_dtype if policy.cast_forward_inputs else None
    return ShardingPolicy(policy.param_dtype, inputs, policy.output_dtype)


def is_in_pieces(tensor: torch.Tensor) -> bool:
    """Whether a tensor is distributed over processes, so that this one does not hold all of it."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)

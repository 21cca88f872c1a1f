"""What forward and backward of one call of a fused region share."""

from dataclasses import dataclass
from typing import Any

import torch

from memopt.ir import FusedNorm, FusedPlan
from memopt.runtime.binding import Binding, Tensors
from memopt.runtime.kernels.language import KINDS
from memopt.runtime.ops.batch_norm import BatchNorm


@dataclass(slots=True)
class Norm:
    """One norm at work: mean, variance, weight and bias (C), ones and zeros where it is not affine."""

    mean: torch.Tensor
    variance: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    eps: float
    activation: int
    parameter: float

    @property
    def arguments(self) -> tuple[Any, ...]:
        """In the order in which kernels take them."""
        return self.mean, self.variance, self.weight, self.bias, self.eps, self.activation, self.parameter


class Call:
    """One forward of a region. The autograd function saves what backward needs; here are the places of it.

    Attributes:
        saved: tensors to save: the arena, mean and variance of its channels, then whatever the places point at.
        statistics_at: by norm step, the place of the mean that it used; the variance follows.
        stash_at: by plain step, what it stashed.
        kept_at: by chain, its kept result.
        size: of the region's inputs, (N, C, *spatial).
        formats: how each input lies.
        requires_grad: values, and parameters written ~p, that have a gradient.
    """

    def __init__(self, plan: FusedPlan, binding: Binding) -> None:
        self.plan = plan
        self.binding = binding
        self.saved: list[torch.Tensor] = []
        self.statistics_at: dict[int, int] = {}
        self.stash_at: dict[int, slice] = {}
        self.kept_at: dict[int, int] = {}
        self.size = torch.Size()
        self.formats: tuple[torch.memory_format, ...] = ()
        self.allow_tf32 = False
        self.requires_grad: set[int] = set()

    def save(self, *tensors: torch.Tensor) -> int:
        """The place of the first of them."""
        self.saved.extend(tensors)
        return len(self.saved) - len(tensors)

    def norm_op(self, step: int) -> BatchNorm:
        """A norm's settings."""
        op = self.binding.ops[step]
        assert isinstance(op, BatchNorm)
        return op

    def norm(self, stage: FusedNorm, mean: torch.Tensor, variance: torch.Tensor, parameters: Tensors) -> Norm:
        """A norm with the statistics that it uses."""
        weight, bias = self.binding.parameters_of(stage.norm, parameters)
        return Norm(
            mean,
            variance,
            torch.ones_like(mean) if weight is None else weight,
            torch.zeros_like(mean) if bias is None else bias,
            self.norm_op(stage.norm).eps,
            KINDS[stage.activation.name],
            stage.activation.parameter,
        )

    def matrix(self, stage: FusedNorm, parameters: Tensors) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight (out, in) and bias of the 1×1 convolution."""
        assert stage.matmul is not None
        weight, bias = self.binding.parameters_of(stage.matmul, parameters)
        assert weight is not None
        return weight.reshape(weight.shape[:2]).contiguous(), bias

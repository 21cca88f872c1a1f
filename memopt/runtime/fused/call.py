"""What forward and backward of one call of a fused region share."""

from dataclasses import dataclass
from typing import Any

import torch

from memopt.ir import NEEDS_INPUT, NEEDS_OUTPUT, FusedChain, FusedNorm, FusedPlan, Kind, PlainStage
from memopt.runtime.binding import Binding, Tensors
from memopt.runtime.kernels import norm_act_conv, norm_act_matmul
from memopt.runtime.kernels.language import KINDS
from memopt.runtime.kernels.norm_act import norm_act
from memopt.runtime.kernels.norm_act_pool import norm_act_pool
from memopt.runtime.kernels.pack_taps import pack_taps, packed_size
from memopt.runtime.ops.base import Params
from memopt.runtime.ops.batch_norm import BatchNorm
from memopt.runtime.rows import empty_averages, empty_rows, laid_like


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
        weight_at: by convolution that runs by itself, its weight in another layout than the module's.
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
        self.weight_at: dict[int, int] = {}
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

    def wanted(self, chain: FusedChain) -> set[int]:
        """Indices of the stages whose results the gradients of a chain read."""
        found = set()
        for index, stage in enumerate(chain.stages):
            if isinstance(stage, PlainStage):
                kind = self.plan.steps[stage.step].op.kind
                reads = kind in NEEDS_INPUT and not stage.own_weight_gradient
                found |= ({index - 1} if reads else set()) | ({index} if kind in NEEDS_OUTPUT else set())
            elif index > 0:
                found.add(index - 1)
        return found

    def lay_out(self, step: int, image: torch.Tensor, parameters: Tensors) -> Params:
        """A plain step's parameters. A convolution's weight is laid out once, here, and not again in backward."""
        own = self.binding.parameters_of(step, parameters)
        if self.plan.steps[step].op.kind is not Kind.CONVOLUTION:
            return own
        weight, *rest = own
        assert weight is not None
        laid = laid_like(image, weight)
        if laid is not weight:
            self.weight_at[step] = self.save(laid)
        return (laid, *rest)

    def laid_out(self, step: int, parameters: Tensors, saved: Tensors) -> Params:
        """What `lay_out` returned, in backward."""
        own = self.binding.parameters_of(step, parameters)
        return (saved[self.weight_at[step]], *own[1:]) if step in self.weight_at else own

    def matrix(self, stage: FusedNorm, parameters: Tensors) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight (out, in) and bias of the 1×1 convolution."""
        assert stage.matmul is not None
        weight, bias = self.binding.parameters_of(stage.matmul, parameters)
        assert weight is not None
        return weight.reshape(weight.shape[:2]).contiguous(), bias

    def taps(self, stage: FusedNorm, parameters: Tensors) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Packed weight and bias of the convolution with a window of three."""
        assert stage.conv is not None
        weight, bias = self.binding.parameters_of(stage.conv, parameters)
        assert weight is not None
        taps = torch.empty(packed_size(weight), dtype=stage.dtype, device=weight.device)
        pack_taps(weight, self.allow_tf32, taps)
        return taps, bias

    def made(self, stage: FusedNorm, channels: int, parameters: Tensors) -> int:
        """Channels that a stage makes of so many."""
        step = stage.conv if stage.matmul is None else stage.matmul
        if step is None:
            return channels
        weight, _ = self.binding.parameters_of(step, parameters)
        assert weight is not None
        return len(weight)

    def empty_result(self, stage: FusedNorm, x: torch.Tensor, parameters: Tensors) -> torch.Tensor:
        """A matrix for what a stage makes of x."""
        if stage.pool is not None:
            return empty_averages(x, stage.pool.window, stage.dtype)
        return empty_rows(x, self.made(stage, x.shape[1], parameters), stage.dtype)

    def moment_rows(self, stage: FusedNorm, x: torch.Tensor, y: torch.Tensor, size: tuple[int, ...]) -> int:
        """Rows of one partial result of a stage's moments."""
        if stage.conv is None:
            return norm_act_matmul.part_rows(x.shape[1], y.shape[1], y.element_size())
        return norm_act_conv.part_rows(size[-1], x.shape[1], y.element_size(), self.allow_tf32)

    def run(
        self,
        stage: FusedNorm,
        norm: Norm,
        parameters: Tensors,
        x: torch.Tensor,
        size: tuple[int, ...],
        y: torch.Tensor,
        moments: torch.Tensor | None,
    ) -> None:
        """Compute a stage: y of x, both matrices of images of a size."""
        if stage.matmul is not None:
            matrix, bias = self.matrix(stage, parameters)
            norm_act_matmul.norm_act_matmul(x, *norm.arguments, matrix, bias, self.allow_tf32, y, moments)
        elif stage.conv is not None:
            taps, bias = self.taps(stage, parameters)
            image = image_size(size)
            norm_act_conv.norm_act_conv(x, *norm.arguments, taps, bias, *image, self.allow_tf32, y, moments)
        elif stage.pool is not None:
            norm_act_pool(x, *norm.arguments, size[-1], window_of(stage), y)
        else:
            norm_act(x, *norm.arguments, y)


def window_of(stage: FusedNorm) -> list[int]:
    """Height and width of what a stage averages: of one position where it does not."""
    return [1, 1] if stage.pool is None else [1, *stage.pool.window][-2:]


def size_made(stage: FusedNorm, size: tuple[int, ...]) -> tuple[int, ...]:
    """The size of an image that a stage makes of one of a size, but for its channels."""
    if stage.pool is None:
        return size
    averaged = (large // one for large, one in zip(size[2:], stage.pool.window, strict=True))
    return (*size[:2], *averaged)


def image_size(size: tuple[int, ...]) -> tuple[int, int]:
    """Height and width of an image (N, C, height, width); a signal (N, C, width) is one row high."""
    return (size[2] if len(size) == 4 else 1), size[-1]

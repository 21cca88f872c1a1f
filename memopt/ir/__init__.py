"""Frozen values shared by every stage. Imports nothing of ours."""

from memopt.ir.chain import ChainReport, Explanation, join_explanations
from memopt.ir.fused import (
    MAX_CONV_CHANNELS,
    MAX_MATMUL_CHANNELS,
    FusedChain,
    FusedNorm,
    FusedPlan,
    Interval,
    PlainStage,
)
from memopt.ir.modules import has_hooks, has_own_forward
from memopt.ir.ops import IDENTITY, NEEDS_INPUT, NEEDS_OUTPUT, Activation, Kind, Operand, OpSpec, Role
from memopt.ir.plan import (
    Compute,
    Extent,
    Gradient,
    Level,
    RegionDraft,
    RegionPlan,
    Slot,
    Step,
)

__all__ = [
    "IDENTITY",
    "MAX_CONV_CHANNELS",
    "MAX_MATMUL_CHANNELS",
    "NEEDS_INPUT",
    "NEEDS_OUTPUT",
    "Activation",
    "ChainReport",
    "Compute",
    "Explanation",
    "Extent",
    "FusedChain",
    "FusedNorm",
    "FusedPlan",
    "Gradient",
    "Interval",
    "Kind",
    "Level",
    "OpSpec",
    "Operand",
    "PlainStage",
    "RegionDraft",
    "RegionPlan",
    "Role",
    "Slot",
    "Step",
    "has_hooks",
    "has_own_forward",
    "join_explanations",
]

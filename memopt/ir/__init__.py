"""Frozen values shared by every stage. Imports nothing of ours."""

from memopt.ir.budget import MemoryPlan, PlannedLayer
from memopt.ir.chain import ChainReport, Explanation, by_block, join_explanations
from memopt.ir.fused import (
    MAX_CONV_CHANNELS,
    MAX_MATMUL_CHANNELS,
    MAX_POOL_WINDOW,
    MAX_WEIGHT_CHANNELS,
    FusedChain,
    FusedNorm,
    FusedPlan,
    Interval,
    PlainStage,
    Pooling,
)
from memopt.ir.modules import has_hooks, has_own_forward
from memopt.ir.moments import Phase, region_has_run, watching_regions
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
from memopt.ir.sharded import is_fully_sharded, is_in_pieces, sharding_policy
from memopt.ir.synchronised import dense, group_of, synchronised_batch_norm, waits_for_others
from memopt.ir.units import (
    MIB,
    duration,
    first_names,
    mebibytes,
    parse_size,
    require_plausible,
    whole_mebibytes,
)

__all__ = [
    "IDENTITY",
    "MAX_CONV_CHANNELS",
    "MAX_MATMUL_CHANNELS",
    "MAX_POOL_WINDOW",
    "MAX_WEIGHT_CHANNELS",
    "MIB",
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
    "MemoryPlan",
    "OpSpec",
    "Operand",
    "Phase",
    "PlainStage",
    "PlannedLayer",
    "Pooling",
    "RegionDraft",
    "RegionPlan",
    "Role",
    "Slot",
    "Step",
    "by_block",
    "dense",
    "duration",
    "first_names",
    "group_of",
    "has_hooks",
    "has_own_forward",
    "is_fully_sharded",
    "is_in_pieces",
    "join_explanations",
    "mebibytes",
    "parse_size",
    "region_has_run",
    "require_plausible",
    "sharding_policy",
    "synchronised_batch_norm",
    "waits_for_others",
    "watching_regions",
    "whole_mebibytes",
]

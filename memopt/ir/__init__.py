"""Frozen values shared by every stage. Imports nothing of ours."""

from memopt.ir.chain import ChainReport, Explanation
from memopt.ir.modules import has_hooks
from memopt.ir.ops import NEEDS_INPUT, NEEDS_OUTPUT, Kind, Operand, OpSpec, Role
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
    "NEEDS_INPUT",
    "NEEDS_OUTPUT",
    "ChainReport",
    "Compute",
    "Explanation",
    "Extent",
    "Gradient",
    "Kind",
    "Level",
    "OpSpec",
    "Operand",
    "RegionDraft",
    "RegionPlan",
    "Role",
    "Slot",
    "Step",
    "has_hooks",
]

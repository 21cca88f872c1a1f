"""What a region keeps, when it computes the rest again, and where everything lies: exactly, or on fused kernels."""

from memopt.plan.cost import Work, recomputed_work, unsaved_bytes
from memopt.plan.fused import plan_fused
from memopt.plan.program import plan_region

__all__ = ["Work", "plan_fused", "plan_region", "recomputed_work", "unsaved_bytes"]

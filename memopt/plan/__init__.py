"""What a region keeps, when it computes the rest again, and where everything lies: exactly, or on fused kernels."""

from memopt.plan.fused import plan_fused
from memopt.plan.keep import unsaved_bytes
from memopt.plan.program import plan_region

__all__ = ["plan_fused", "plan_region", "unsaved_bytes"]

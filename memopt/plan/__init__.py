"""From what a region computes to what it keeps, computes again, and where its scratch lies."""

from memopt.plan.program import plan_region

__all__ = ["plan_region"]

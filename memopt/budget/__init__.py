"""Levels for a memory budget: what each layer keeps from forward to backward, and what it computes again."""

from memopt.budget.calls import plan_call
from memopt.budget.planner import Rewriting, plan_within

__all__ = ["Rewriting", "plan_call", "plan_within"]

"""memopt: train any naive DenseNet in memory linear in its depth.

    model = memopt.apply(model)

traces the model at its first training forward, finds the concat → norm → activation chains of its dense
blocks and replaces the training forward by one that recomputes them in backward. See `memopt/README.md` in the
source tree for the architecture.
"""

from memopt.api import apply, compare, explain, plan_memory, remove
from memopt.config import Config
from memopt.errors import BudgetError, CaptureError, ConfigError, EquivalenceError, MemoptError, ModelError
from memopt.ir import ChainReport, Explanation, MemoryPlan, PlannedLayer

__version__ = "0.1.0"

__all__ = [
    "BudgetError",
    "CaptureError",
    "ChainReport",
    "Config",
    "ConfigError",
    "EquivalenceError",
    "Explanation",
    "MemoptError",
    "MemoryPlan",
    "ModelError",
    "PlannedLayer",
    "apply",
    "compare",
    "explain",
    "plan_memory",
    "remove",
]

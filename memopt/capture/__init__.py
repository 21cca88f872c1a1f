"""From a module and its inputs to an fx graph.

The user's forward is run once on fake tensors, and every call into torch is written down as a node of a
`torch.fx.Graph`. Python sees real tensor objects with real shapes, so `isinstance`, shape arithmetic, `len` and
branches on shapes or flags work as in eager; what was decided from them is valid for this input signature and
this state of the modules only (`memopt.rewrite.signature` compares both before a graph is used).
"""

from memopt.capture.contexts import restoring_context
from memopt.capture.frozen import frozen, has_users_code
from memopt.capture.interception import is_recording, through_checkpoints
from memopt.capture.places import Place, outside_places, outside_signature, values_read
from memopt.capture.recorder import Captured, capture
from memopt.capture.side_effects import keeping_python_values
from memopt.capture.source import replaying_sources

__all__ = [
    "Captured",
    "Place",
    "capture",
    "frozen",
    "has_users_code",
    "is_recording",
    "keeping_python_values",
    "outside_places",
    "outside_signature",
    "replaying_sources",
    "restoring_context",
    "through_checkpoints",
    "values_read",
]

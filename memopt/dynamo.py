"""The second front end: `torch.compile(model, backend="memopt")`, for forwards with real control flow.

Dynamo follows forward through branches, counters and prints, and hands over one graph for each stretch in between.
Each is rewritten as a model is. Registered through the entry point "torch_dynamo_backends".
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from memopt.api import apply
from memopt.capture import replaying_sources
from memopt.config import Config


def backend(
    graph: fx.GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """Make one graph of Dynamo's train in memory linear in its depth.

    Args:
        graph: what Dynamo recorded; parameters are among its inputs.
        example_inputs: not looked at: the graph is planned at its first call, from its real inputs.
        options: fields of `memopt.Config`, as in `torch.compile(model, backend="memopt", options={...})`.

    Raises:
        ConfigError: an option has a value it cannot have.
    """
    return apply(replaying_sources(graph), config=Config(**(options or {})))

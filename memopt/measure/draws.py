"""The same random numbers for models of different dtypes."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class SameDraws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Random masks of dropout that do not depend on the dtype they are drawn for.

    Attributes:
        any: random numbers were drawn, of whatever kind.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.any = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        aten = torch.ops.aten
        self.any |= torch.Tag.nondeterministic_seeded in func.tags
        if func is aten.bernoulli_.float:
            tensor, p = args[0], args[1] if len(args) > 1 else 0.5
            return tensor.copy_(torch.rand(tensor.shape, device=tensor.device) < p)
        if func is aten.native_dropout.default and args[2]:
            x, p = args[0], args[1]
            mask = torch.rand(x.shape, device=x.device) < 1.0 - p
            return x * mask / (1.0 - p), mask
        return func(*args, **(kwargs or {}))

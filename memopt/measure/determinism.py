"""Settings under which eager repeats itself bit for bit, wherever it can."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

# Pooling backwards that torch.use_deterministic_algorithms documents as having no deterministic form on CUDA,
# as their warnings spell them.
_POOLING_BACKWARDS = (
    "avg_pool3d_backward",
    "adaptive_avg_pool2d_backward",
    "adaptive_avg_pool3d_backward",
    "adaptive_max_pool2d_backward",
    "fractional_max_pool2d_backward",
    "fractional_max_pool3d_backward",
    "max_pool3d_with_indices_backward",
)


_aten = torch.ops.aten
_WITHOUT_A_FIXED_ORDER = frozenset(
    {
        _aten.avg_pool3d_backward.default,
        _aten._adaptive_avg_pool2d_backward.default,
        _aten._adaptive_avg_pool3d_backward.default,
        _aten.adaptive_max_pool2d_backward.default,
        _aten.adaptive_max_pool3d_backward.default,
        _aten.max_pool3d_with_indices_backward.default,
    }
)


class _PoolingOnCpu(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs the pooling backwards that have no deterministic form on CUDA on the CPU instead.

    One atomic addition makes every gradient upstream of it differ from run to run, and there would be nothing left to
    compare. What the operator is given and what it returns stay those of the model under test.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in _WITHOUT_A_FIXED_ORDER or not args[0].is_cuda:
            return func(*args, **(kwargs or {}))
        grad = args[0]

        def on_cpu(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.cpu().float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor.cpu()

        result = func(*tree_map_only(torch.Tensor, on_cpu, args), **tree_map_only(torch.Tensor, on_cpu, kwargs or {}))
        return result.to(device=grad.device, dtype=grad.dtype)


class Nondeterminism:
    """What torch warned of while the settings were in force."""

    def __init__(self) -> None:
        self.messages: list[warnings.WarningMessage] = []

    @property
    def pooling_ran(self) -> bool:
        """A pooling backward ran for which torch has no deterministic algorithm."""
        texts = [str(message.message) for message in self.messages]
        return any("deterministic" in text and any(name in text for name in _POOLING_BACKWARDS) for text in texts)


@contextmanager
def deterministic(pooling_on_cpu: bool = False) -> Iterator[Nondeterminism]:
    """Deterministic algorithms where torch has them, warnings recorded; every setting is put back after.

    Args:
        pooling_on_cpu: run the pooling backwards that have no deterministic form on CUDA on the CPU.
    """
    cudnn = torch.backends.cudnn
    cudnn_before = cudnn.deterministic, cudnn.benchmark
    algorithms_before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    seen = Nondeterminism()
    with warnings.catch_warnings(record=True) as seen.messages:
        warnings.simplefilter("always")
        try:
            cudnn.deterministic, cudnn.benchmark = True, False
            torch.use_deterministic_algorithms(True, warn_only=True)
            with _PoolingOnCpu() if pooling_on_cpu else nullcontext():  # type: ignore[no-untyped-call]
                yield seen
        finally:
            cudnn.deterministic, cudnn.benchmark = cudnn_before
            torch.use_deterministic_algorithms(algorithms_before[0], warn_only=algorithms_before[1])

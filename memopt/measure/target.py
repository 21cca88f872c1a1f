"""The machine a prediction is made for, as data: nothing here asks what this machine has."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Target:
    """What a prediction needs to know of the machine it speaks of.

    Attributes:
        name: how the report calls it.
        device_type: the device type predicted for; operators that torch runs differently there are chosen by
            it.
        gpu: which one, as `torch.cuda.get_device_name` has it, for what differs between GPUs of one kind; None where
            that is not known: then the most that any takes is predicted.
        rounding_bytes: every allocation is rounded up to a multiple of this on a device other than "cuda", whose
            caching allocator is modelled.
        blas_workspace_bytes: what cuBLAS keeps from its first call on, for each of the two threads that call it
            (forward's and backward's): 32 MiB on compute capability 9.0 and 10.0, 8.1 MiB before
            (`getChosenWorkspaceSize` in ATen/cuda/CUDABlas.cpp).
        blas_lt_workspace_bytes: what cuBLASLt keeps beside it from the first product on that adds a bias, as a linear
            layer's does (`getCUDABlasLtWorkspaceSize` in ATen/cuda/CublasHandlePool.cpp).
        expandable_segments: whether the allocator is set to grow its segments.
        bytes_per_second: what kernels read and write, as far as they are bound by that.
        flops_per_second: what convolutions compute, likewise.
    """

    name: str = "GPU"
    device_type: str = "cuda"
    gpu: str | None = None
    rounding_bytes: int = 512
    blas_workspace_bytes: int = 32 * 2**20
    blas_lt_workspace_bytes: int = 2**20
    expandable_segments: bool = False
    bytes_per_second: float = 2.4e12
    flops_per_second: float = 1.5e14

    def seconds(self, moved_bytes: int, flops: int) -> float:
        """Roughly how long kernels take that move and compute so much: good for comparing, not for clocks."""
        return max(moved_bytes / self.bytes_per_second, flops / self.flops_per_second)


GPU = Target()

"""What runs in place of a region: forward, recompute and backward, by eager's own kernels or by fused ones."""

from memopt.runtime.fused import fused_callable
from memopt.runtime.fused.support import unsupported
from memopt.runtime.region import region_callable
from memopt.runtime.workspaces import take_blas_workspaces

__all__ = ["fused_callable", "region_callable", "take_blas_workspaces", "unsupported"]

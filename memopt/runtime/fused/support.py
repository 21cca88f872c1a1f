"""Where there are fused kernels, and what PyTorch's settings ask of them."""

import importlib.util
from typing import Any

import torch

OLDEST = (8, 0)
"""Compute capability from which the kernels are compiled and tested."""


def unsupported(device: torch.device) -> str | None:
    """Why regions on a device cannot run on fused kernels; None if they can. A CPU runs the references."""
    if device.type == "cpu":
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return f"there are no fused kernels for {'ROCm' if device.type == 'cuda' else device.type}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        return f"fused kernels need compute capability 8.0, and this GPU has {capability[0]}.{capability[1]}"
    return None


def allows_tf32(device: torch.device) -> bool:
    """Whether eager's convolutions may round their operands to TF32: by cuDNN's setting, else by matmul's."""
    if device.type != "cuda":
        return False
    # `allow_tf32` raises where the newer setting was used.
    cudnn: Any = torch.backends.cudnn
    backend = cudnn.conv if cudnn.enabled else torch.backends.cuda.matmul
    return bool(backend.fp32_precision == "tf32")

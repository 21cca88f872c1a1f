"""Let cuBLAS take its workspaces before scratch is laid out.

cuBLAS takes one workspace (tens of MiB) per thread and stream at its first call and keeps it. Taken in the middle of
the first step, it lands inside a block that scratch has just given back, and the next step's scratch no longer fits
there: the device loses that block for good.
"""

import torch


def take_blas_workspaces(device: torch.device) -> None:
    """Make forward's and backward's thread call cuBLAS once on the current stream of a CUDA device."""
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is None and not _can_prepare(device):
        return

    def untouched(tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    # The hooks of a checkpoint or an offloader around this call count what autograd saves: these are not theirs.
    hooks = torch.autograd.graph.saved_tensors_hooks(untouched, untouched)
    with torch.enable_grad(), torch.autocast("cuda", enabled=False), hooks:
        x = torch.ones(2, 2, device=device, requires_grad=True)
        torch.autograd.backward((x @ x).sum())


def _can_prepare(device: torch.device) -> bool:
    """Whether there is a cuBLAS to call. Under fake tensors the calls cost nothing, and a prediction sees them."""
    under_a_mode = torch._C._len_torch_dispatch_stack() > 0
    return device.type == "cuda" and not under_a_mode and not torch.cuda.is_current_stream_capturing()

"""Several processes, as torchrun starts them: joining the group, wrapping the model, failing together."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from ..errors import CommandError
from .batches import Share

_LOST = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "timed out", "Broken pipe")
"""How gloo and NCCL say that another process is gone or silent."""


_kept: list[object] = []
"""Groups that were joined. DistributedDataParallel must not be the last to let go of one: it waits for the group's
threads without letting them run Python, which they need to end (seen as a wait for ever in about one of four runs)."""


@dataclass(frozen=True, slots=True)
class Wrapping:
    """How a model is run on several devices or processes; at most one of the first two.

    Attributes:
        fsdp: `fully_shard` instead of DistributedDataParallel.
        data_parallel: `nn.DataParallel`.
        sync_batchnorm: batch statistics over all processes.
        compile: `torch.compile`.
    """

    fsdp: bool = False
    data_parallel: bool = False
    sync_batchnorm: bool = False
    compile: bool = False


def launched() -> bool:
    """Whether a launcher such as torchrun started this process as one of several."""
    return dist.is_torchelastic_launched() or {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= set(os.environ)


@contextmanager
def process_group(device: torch.device, timeout_seconds: int) -> Iterator[Share]:
    """Join the group that the launcher's environment names; without a launcher there is none.

    Yields:
        This process's share of the work.

    Raises:
        CommandError: another process is gone or does not answer.
    """
    if not launched():
        yield Share()
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
        _kept.append(dist.group.WORLD)
        yield Share(dist.get_rank(), dist.get_world_size())
    except (RuntimeError, dist.DistError) as error:
        if not any(text in str(error) for text in _LOST):
            raise
        raise CommandError(
            f"Another process of the group is gone or did not answer for {timeout_seconds} s (--timeout). Look for its "
            "own error; --resume goes on from what was saved last."
        ) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def require_possible(wrapping: Wrapping, device: torch.device, amp: str | None) -> None:
    """Refuse what this machine, or this number of processes, cannot do.

    Raises:
        CommandError: with what to do instead.
    """
    together = "torchrun --nproc-per-node=2 -m memopt_cli train ..."
    if wrapping.fsdp and not launched():
        raise CommandError(f"--fsdp shards the model over several processes, and this is one. Start them: {together}")
    if wrapping.sync_batchnorm and not launched():
        raise CommandError(f"--sync-batchnorm needs several processes, and this is one. Start them: {together}")
    if wrapping.sync_batchnorm and device.type != "cuda":
        raise CommandError("--sync-batchnorm: torch synchronises batch statistics on GPUs only. Leave it out.")
    if wrapping.data_parallel and launched():
        raise CommandError("--data-parallel is for one process. Leave it out: torchrun's processes share the batch.")
    if wrapping.fsdp and amp == "fp16":
        raise CommandError("--fsdp with --amp fp16 would scale shards of gradients apart. Use --amp bf16.")


def wrapped(model: nn.Module, wrapping: Wrapping) -> Callable[[torch.Tensor], torch.Tensor]:
    """What is called in training. memopt has been applied to `model` already."""
    forward: Any = model
    if wrapping.compile:
        forward = torch.compile(model)
    if wrapping.data_parallel:
        return nn.DataParallel(forward)
    if not dist.is_initialized():
        return forward  # type: ignore[no-any-return]
    if wrapping.fsdp:
        # The model as a whole: a DenseNet has few parameters, and inner boundaries would cut its dense blocks.
        fully_shard(model)
        return forward  # type: ignore[no-any-return]
    # Unused parameters are looked for, because DDP then keeps gradients in the order of the parameters. Otherwise it
    # sorts them by their arrival, which is another with memopt, and more than two processes add in another order.
    return DistributedDataParallel(forward, find_unused_parameters=True)


def on_first_rank(work: Callable[[], object]) -> None:
    """Do something on rank 0 while the others wait; if it fails there, it fails on all.

    Raises:
        CommandError: as it was raised on rank 0.
    """
    failure: list[str | None] = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            work()
        except CommandError as error:
            failure = [str(error)]
    if dist.is_initialized():
        dist.broadcast_object_list(failure, 0)
    if failure[0] is not None:
        raise CommandError(failure[0])

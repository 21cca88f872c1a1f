"""Run by each process of a group: 20 training steps of a small DenseNet, everything that can be seen saved.

python tests/distributed/steps.py ddp|fsdp naive|exact FOLDER
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import memopt
from tests.helpers import dense_net

STEPS, SAMPLES, RATE = 20, 4, 0.02

Step = dict[str, torch.Tensor]


def micro_batch(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What a rank sees in a step."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    images = torch.randn(SAMPLES, 3, 6, 6, generator=generator)
    return images, torch.randint(0, 5, (SAMPLES,), generator=generator)


def optimizer_of(model: nn.Module) -> torch.optim.SGD:
    """SGD with momentum."""
    return torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)


def observed(model: nn.Module, loss: torch.Tensor) -> Step:
    """Loss, gradients, parameters and buffers as copies."""
    seen = {"loss": loss.detach().clone()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        seen |= {f"parameter {name}": _whole(parameter), f"gradient {name}": _whole(parameter.grad)}
    return seen | {f"buffer {name}": buffer.clone() for name, buffer in model.named_buffers()}


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().clone()


def train(kind: str, variant: str) -> list[Step]:
    """The steps of this process."""
    model = dense_net()
    if variant == "exact":
        memopt.apply(model, config=memopt.Config(numerics="exact"))
    forward: nn.Module = model
    if kind == "fsdp":
        fully_shard(model)
    else:
        # With more than two processes sums depend on where in a bucket a gradient lies. DDP sorts buckets by the order
        # in which gradients arrive, which memopt changes, unless it looks for unused parameters.
        forward = DistributedDataParallel(model, find_unused_parameters=dist.get_world_size() > 2)
    optimizer = optimizer_of(model)
    steps = []
    for step in range(STEPS):
        images, labels = micro_batch(step, dist.get_rank())
        loss = nn.functional.cross_entropy(forward(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps.append(observed(model, loss))
    if variant == "exact":
        explanation = memopt.explain(model)
        assert explanation.ran, str(explanation)
        assert len(explanation.rewritten) == len(explanation.chains), str(explanation)
    return steps


def main() -> None:
    """Join the group, train, save."""
    kind, folder = sys.argv[1], Path(sys.argv[2])
    dist.init_process_group("gloo")
    for variant in ("naive", "exact"):
        torch.save(train(kind, variant), folder / f"{variant}{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

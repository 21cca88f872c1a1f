"""On a GPU: two processes that share it, with a gloo group between them; one with NCCL; a compiled model."""

import copy
import warnings
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import memopt
from densenet_models import bc
from memopt.measure.bits import same_bits
from tests.composition.ranks import Ranks
from tests.composition.sync_on_cpu import collectives
from tests.helpers import assert_rewritten, assert_same, train_step

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    pair = Ranks()
    yield pair
    pair.stop()


def _deterministic() -> None:
    torch.backends.cudnn.deterministic = True
    # Weights of 1×1 convolutions lie in both formats at once, and DDP and cuDNN name different strides.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")


def synchronised(rank: int, level: str, channels_last: bool, amp: bool) -> None:
    """SyncBatchNorm by ATen's kernels: eager's bits and eager's collectives, under DDP."""
    _deterministic()
    torch.manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    naive = nn.SyncBatchNorm.convert_sync_batchnorm(bc.DenseNet(depth=22)).cuda().to(memory_format=layout)
    rewritten = memopt.apply(copy.deepcopy(naive), config=memopt.Config(recompute=level))
    models = [DistributedDataParallel(m) for m in (naive, rewritten)]
    context = partial(torch.autocast, "cuda", dtype=torch.bfloat16, enabled=amp)
    logs: tuple[list[str], list[str]] = ([], [])
    for step in range(3):
        torch.manual_seed(10 * step + rank)
        x = torch.randn(8, 3, 32, 32, device="cuda").contiguous(memory_format=layout)
        observed = []
        for model, log in zip(models, logs, strict=True):
            with collectives(log):
                observed.append(train_step(model, (x,), context=context))
        assert_same(*observed)
    assert logs[0] == logs[1]
    assert_rewritten(rewritten, 12)
    assert not memopt.explain(rewritten).rejected


@pytest.mark.parametrize("amp", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("level", ["concat", "layer"])
def test_sync_batch_norm_equals_eager(level: str, channels_last: bool, amp: bool, ranks: Ranks) -> None:
    ranks.run(synchronised, level, channels_last, amp)


def fused_under_ddp(rank: int) -> list[torch.Tensor]:
    """Fused kernels under DDP: every rank ends with the same parameters."""
    torch.manual_seed(0)
    model = memopt.apply(bc.DenseNet(depth=22).cuda(), config=memopt.Config(numerics="fast"))
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1, momentum=0.9)
    for step in range(3):
        torch.manual_seed(10 * step + rank)
        parallel(torch.randn(8, 3, 32, 32, device="cuda")).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert {chain.numerics for chain in memopt.explain(model).rewritten} == {"fast"}
    return [p.detach().cpu() for p in model.parameters()]


def test_fused_kernels_under_ddp(ranks: Ranks) -> None:
    one, two = ranks.run(fused_under_ddp)
    assert all(same_bits(a, b) for a, b in zip(one, two, strict=True))


def fused_under_fsdp(rank: int) -> list[int]:
    """Activation peaks of a sharded naive and a sharded rewritten model, blocks fused."""
    peaks = []
    for numerics in (None, "fast"):
        torch.manual_seed(0)
        model = bc.DenseNet(depth=40).cuda()
        if numerics is not None:
            memopt.apply(model, config=memopt.Config(numerics=numerics))
        mesh = init_device_mesh("cuda", (1,))
        for part in [m for m in model.modules() if isinstance(m, bc.DenseBlock)]:
            fully_shard(part, mesh=mesh)
        fully_shard(model, mesh=mesh)
        x = torch.randn(16, 3, 32, 32, device="cuda")
        for _ in range(3):
            model.zero_grad()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            loss = model(x).square().mean()
            loss.backward()
            assert bool(loss.isfinite())
            peaks.append(torch.cuda.max_memory_allocated() - before)
        if numerics is not None:
            chains = memopt.explain(model).chains
            assert len(chains) == 18
            assert {chain.numerics for chain in chains} == {"fast"}
    return [peaks[2], peaks[5]]


def test_fused_kernels_inside_what_fsdp_shards() -> None:
    one = Ranks(backend="nccl", world_size=1)
    try:
        ((naive, ours),) = one.run(fused_under_fsdp)
    finally:
        one.stop()
    assert ours < 0.4 * naive


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # by Inductor itself, and this one:
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
@pytest.mark.parametrize("numerics", ["exact", "fast"])
def test_compiled_by_inductor_it_stays_small(numerics: str) -> None:
    torch._dynamo.reset()
    peaks = []
    for compiled in (False, True):
        model = memopt.apply(bc.DenseNet(depth=40).cuda(), config=memopt.Config(numerics=numerics))
        forward = torch.compile(model) if compiled else model
        x = torch.randn(32, 3, 32, 32, device="cuda")
        for _ in range(3):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            forward(x).square().mean().backward()
            peaks.append(torch.cuda.max_memory_allocated() - before)
            model.zero_grad()
    assert peaks[5] <= 1.05 * peaks[2]

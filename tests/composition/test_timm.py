"""timm's DenseNet with its own SyncBatchNormAct, in two processes."""

import pytest
import torch

from tests.composition.ranks import Ranks
from tests.composition.sync_on_cpu import allow_on_cpu
from tests.composition.test_sync_batch_norm import assert_alike_on_all_ranks
from tests.helpers import LEVELS
from tests.wild.libraries import DENSE, SyncBatchNormAct, convert_sync_batchnorm

NAME = "timm DenseNet, BatchNormAct2d"


def trained(rank: int, level: str, ddp: bool) -> None:
    allow_on_cpu()
    make, shape, chains = DENSE[NAME]
    torch.manual_seed(0)
    naive = convert_sync_batchnorm(make())
    assert sum(isinstance(module, SyncBatchNormAct) for module in naive.modules()) > chains
    batches = [torch.randn(shape, generator=torch.Generator().manual_seed(10 * step + rank)) for step in (0, 1)]
    assert_alike_on_all_ranks(naive, level, batches, ddp, chains)


@pytest.mark.parametrize("ddp", [False, True], ids=["alone", "ddp"])
@pytest.mark.parametrize("level", LEVELS)
def test_a_converted_dense_net_trains_as_eager_does(level: str, ddp: bool, ranks: Ranks) -> None:
    ranks.run(trained, level, ddp)

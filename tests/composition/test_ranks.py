"""The processes that tests run in never keep a test waiting, whatever happens in them."""

import os
import time
from collections.abc import Iterator

import pytest
import torch
from torch import distributed

from tests.composition import ranks as ranks_module
from tests.composition.ranks import Ranks


@pytest.fixture
def one() -> Iterator[Ranks]:
    alone = Ranks(world_size=1)
    yield alone
    alone.stop()


def total(rank: int) -> float:
    tensor = torch.ones(1) * (rank + 1)
    distributed.all_reduce(tensor)
    return float(tensor)


def fails(rank: int) -> None:
    raise ValueError("on purpose")


def hangs(rank: int) -> None:
    time.sleep(600)


def dies(rank: int) -> None:
    os._exit(3)


def test_every_rank_answers(ranks: Ranks) -> None:
    assert ranks.run(total) == [3.0, 3.0]


def test_what_goes_wrong_fails_the_test_and_not_the_next(one: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match="on purpose"):
        one.run(fails)
    with pytest.raises(AssertionError, match="dies: a rank hung or died"):
        one.run(dies)
    assert one.run(total) == [1.0]
    monkeypatch.setattr(ranks_module, "TASK_SECONDS", 0.5)
    with pytest.raises(AssertionError, match="hangs: a rank hung or died"):
        one.run(hangs)

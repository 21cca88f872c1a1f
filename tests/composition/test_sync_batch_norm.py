"""SyncBatchNorm inside chains: eager's bits, eager's collectives, none of them twice."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import memopt
from tests.composition.ranks import Ranks
from tests.composition.sync_on_cpu import allow_on_cpu, collectives
from tests.helpers import (
    LEVELS,
    assert_exact,
    assert_rewritten,
    assert_same,
    counted_saves,
    dense_net,
    images,
    rewritten_copy,
    train_step,
    unsettle,
)
from tests.rewrite.test_between import ReadsStatistics, SharedGate, Slices, SumWithPast
from tests.wild.models import CHAINS, LAYERS

convert = nn.SyncBatchNorm.convert_sync_batchnorm


class SyncBatchNormAct(nn.SyncBatchNorm):
    """As timm writes it: the norm's own forward, then dropout and activation."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.drop = nn.Identity()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.drop(super().forward(x)))


def synchronised() -> nn.Module:
    return convert(dense_net())


def half_synchronised() -> nn.Module:
    """BatchNorm and SyncBatchNorm in one chain."""
    model = dense_net()
    for layer in (*model.block1.layers, *model.block2.layers):
        layer.norm2 = convert(layer.norm2)
    return model


def with_activations() -> nn.Module:
    model = dense_net()
    torch.manual_seed(0)
    for layer in (*model.block1.layers, *model.block2.layers):
        layer.norm1 = SyncBatchNormAct(layer.norm1.num_features)
        layer.norm2 = SyncBatchNormAct(layer.norm2.num_features)
        layer.relu1 = layer.relu2 = nn.Identity()
    return unsettle(model)


def with_settings(**settings: Any) -> nn.Module:
    model = dense_net()
    torch.manual_seed(0)
    for layer in (*model.block1.layers, *model.block2.layers):
        layer.norm1 = nn.SyncBatchNorm(layer.norm1.num_features, **settings)
    return unsettle(model)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "converted": synchronised,
    "one norm of two": half_synchronised,
    "norm and activation in one module": with_activations,
    "cumulative average": lambda: with_settings(momentum=None),
    "no affine part": lambda: with_settings(affine=False),
    "no running statistics": lambda: with_settings(track_running_stats=False),
}


def trained(rank: int, name: str, level: str, sizes: tuple[int, int], ddp: bool) -> None:
    allow_on_cpu()
    assert_alike_on_all_ranks(MODELS[name](), level, [images(sizes[rank], seed=10 * s + rank) for s in (0, 1)], ddp, 7)


def assert_alike_on_all_ranks(
    naive: nn.Module, level: str, batches: list[torch.Tensor], ddp: bool, at_least: int
) -> None:
    """A step a batch, naive and rewritten: the same bits, the same collectives in the same order."""
    rewritten = rewritten_copy(naive, level)
    logs: tuple[list[str], list[str]] = ([], [])
    models = [DistributedDataParallel(m) if ddp else m for m in (naive, rewritten)]
    for x in batches:
        observed = []
        for model, log in zip(models, logs, strict=True):
            with collectives(log):
                observed.append(train_step(model, (x,)))
        assert_same(*observed)
    assert logs[0] == logs[1]
    gathered = [entry for entry in logs[0] if entry.startswith("all_gather")]
    assert len(gathered) == len(batches) * sum(isinstance(m, nn.SyncBatchNorm) for m in naive.modules()) > 0
    assert_rewritten(rewritten, at_least)
    assert not memopt.explain(rewritten).rejected


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", MODELS)
def test_trains_as_eager_does(name: str, level: str, ranks: Ranks) -> None:
    ranks.run(trained, name, level, (2, 2), False)


@pytest.mark.parametrize("sizes", [(1, 3), (2, 0)])
def test_batches_of_different_size(sizes: tuple[int, int], ranks: Ranks) -> None:
    ranks.run(trained, "converted", "layer", sizes, True)


def test_under_distributed_data_parallel(ranks: Ranks) -> None:
    ranks.run(trained, "converted", "layer", (2, 2), True)


def reading_statistics_of_its_own() -> nn.Module:
    model = convert(ReadsStatistics())
    for layer in model.layers:
        layer.norm1, layer.act1 = SyncBatchNormAct(layer.norm1.num_features), nn.Identity()
    return model


BETWEEN: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "a gate behind each layer": (lambda: convert(SharedGate()), CHAINS),
    "a sum with an earlier concat": (lambda: convert(SumWithPast()), CHAINS),
    "a slice of the concat": (lambda: convert(Slices()), LAYERS),
    "statistics of a norm that has just run": (lambda: convert(ReadsStatistics()), CHAINS),
    "statistics of a norm that was looked into": (reading_statistics_of_its_own, CHAINS),
}


def with_something_between(rank: int, name: str, level: str) -> None:
    """Chains with other operations between their parts."""
    allow_on_cpu()
    make, chains = BETWEEN[name]
    torch.manual_seed(0)
    naive = make()
    rewritten = rewritten_copy(naive, level)
    logs: tuple[list[str], list[str]] = ([], [])
    for step in range(2):
        observed = []
        for model, log in zip((naive, rewritten), logs, strict=True):
            with collectives(log):
                observed.append(train_step(model, (images(seed=10 * step + rank),)))
        assert_same(*observed)
    assert logs[0] == logs[1] != []
    assert_rewritten(rewritten, chains)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", BETWEEN)
def test_with_something_between_the_parts_of_a_chain(name: str, level: str, ranks: Ranks) -> None:
    ranks.run(with_something_between, name, level)


class Branching(nn.Module):
    """Decides by the values of a tensor around a network that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = synchronised()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) if bool(x.sum() > -1e9) else self.inner(-x)


def in_parts(rank: int) -> None:
    allow_on_cpu()
    naive, rewritten = Branching(), memopt.apply(Branching())
    logs: tuple[list[str], list[str]] = ([], [])
    observed = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the whole cannot be recorded
        for model, log in zip((naive, rewritten), logs, strict=True):
            with collectives(log):
                observed.append(train_step(model, (images(seed=rank),)))
    assert_same(*observed)
    assert logs[0] == logs[1] != []
    assert_rewritten(rewritten, 7)


def test_the_parts_of_a_model_are_rewritten_where_the_whole_cannot_be(ranks: Ranks) -> None:
    ranks.run(in_parts)


def tried_now(rank: int) -> None:
    """One rank alone asks what would become of the parts: a trial would wait for the other."""
    allow_on_cpu()
    if rank == 0:
        log: list[str] = []
        with collectives(log), pytest.raises(memopt.CaptureError, match="forward needs the value of a tensor"):
            memopt.apply(Branching(), images())
        assert log == []


def test_a_trial_of_the_parts_does_not_wait_for_other_processes(ranks: Ranks) -> None:
    ranks.run(tried_now)


def converted_later(rank: int) -> None:
    """The norms of an applied model are converted after a step."""
    allow_on_cpu()
    naive, model = dense_net(), memopt.apply(dense_net())
    x = images(seed=rank)
    assert_same(*(train_step(each, (x,)) for each in (naive, model)))
    naive, model = (convert(each) for each in (naive, model))
    logs: tuple[list[str], list[str]] = ([], [])
    observed = []
    for each, log in zip((naive, model), logs, strict=True):
        with collectives(log):
            observed.append(train_step(each, (x,)))
    assert_same(*observed)
    assert logs[0] == logs[1] != []
    assert len(memopt.explain(model).rewritten) == 7


def test_converted_after_apply(ranks: Ranks) -> None:
    ranks.run(converted_later)


def in_eval_mode(rank: int) -> None:
    allow_on_cpu()
    naive = synchronised().eval()
    log: list[str] = []
    rewritten = rewritten_copy(naive)
    with collectives(log):
        assert_same(train_step(naive, (images(),)), train_step(rewritten, (images(),)))
    assert log == []
    assert_rewritten(rewritten, 7)


def test_eval_mode_needs_no_other_process(ranks: Ranks) -> None:
    ranks.run(in_eval_mode)


def saved_bytes(model: nn.Module) -> int:
    sizes: list[int] = []
    model(images(4, 8))
    with counted_saves(sizes):
        model(images(4, 8))
    return sum(sizes)


def memory(rank: int) -> list[int]:
    allow_on_cpu()
    naive = synchronised()
    return [saved_bytes(model) for model in (naive, rewritten_copy(naive), rewritten_copy(dense_net()))]


def test_as_little_is_saved_as_with_batch_norm(ranks: Ranks) -> None:
    for naive, ours, ours_with_batch_norm in ranks.run(memory):
        assert ours < 0.6 * naive
        assert ours <= 1.02 * ours_with_batch_norm


def with_fast(rank: int) -> str:
    allow_on_cpu()
    naive = synchronised()
    model = rewritten_copy(naive, numerics="fast")
    assert_same(train_step(naive, (images(),)), train_step(model, (images(),)))
    return str(memopt.explain(model))


def test_fused_kernels_leave_it_to_the_exact_runtime_with_the_reason(ranks: Ranks) -> None:
    for text in ranks.run(with_fast):
        assert "runs exactly, not on fused kernels: its norms wait for the statistics of other processes" in text


def verified_now(rank: int) -> tuple[str, ...]:
    allow_on_cpu()
    log: list[str] = []
    with collectives(log):
        model = memopt.apply(synchronised(), images()) if rank == 0 else synchronised()
    assert log == []
    return memopt.explain(model).notes


def test_verification_does_not_wait_for_other_processes(ranks: Ranks) -> None:
    assert any("Not verified" in note and "SyncBatchNorm" in note for note in ranks.run(verified_now)[0])


def own_group(rank: int) -> None:
    """Statistics over a group of this rank alone: no synchronisation at all, in eager too."""
    allow_on_cpu()
    groups = [distributed.new_group([n]) for n in range(distributed.get_world_size())]
    naive = convert(dense_net(), groups[rank])
    rewritten = memopt.apply(copy.copy(convert(dense_net(), groups[rank])))
    log: list[str] = []
    with collectives(log):
        assert_same(train_step(naive, (images(),)), train_step(rewritten, (images(),)))
    assert log == []
    assert_rewritten(rewritten, 7)


def test_a_group_of_one(ranks: Ranks) -> None:
    ranks.run(own_group)


@pytest.mark.parametrize("name", MODELS)
def test_without_processes_it_is_batch_norm(name: str) -> None:
    assert_exact(MODELS[name](), images(), at_least=7)
    assert_exact(MODELS[name]().eval(), images(), at_least=7)

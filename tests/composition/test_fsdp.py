"""FSDP2 (`fully_shard`) in two processes: blocks are called as modules, and memory is saved inside them."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import memopt
from memopt.measure.bits import same_bits
from tests.composition.ranks import WORLD_SIZE, Ranks
from tests.composition.sync_on_cpu import allow_on_cpu, collectives
from tests.helpers import counted_saves, dense_net, images


def per_block(model: nn.Module) -> list[nn.Module]:
    return [model.block1, model.transition, model.block2, model.final, model.classifier]


def per_layer(model: nn.Module) -> list[nn.Module]:
    return [*model.block1.layers, *model.block2.layers]


def nested(model: nn.Module) -> list[nn.Module]:
    return [model.block1.layers[1], model.block1, model.block2]


PARTS: dict[str, Callable[[nn.Module], list[nn.Module]]] = {
    "per block": per_block,
    "per layer": per_layer,
    "a layer inside a block": nested,
    "the whole model": lambda model: [],
}
POLICIES = {
    "full precision": MixedPrecisionPolicy(),
    "bfloat16": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
    "bfloat16, results wide": MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32),
}


def sharded(model: nn.Module, parts: str, policy: str = "full precision", **options: bool) -> nn.Module:
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    for part in (*PARTS[parts](model), model):
        fully_shard(part, mesh=mesh, mp_policy=POLICIES[policy], **options)
    return model


def step(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Loss, gradients, parameters after SGD, buffers: each whole."""
    loss = model(x).float().square().sum()
    loss.backward()
    gradients = [whole(p.grad) for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.01 * p.grad
    model.zero_grad()
    return [loss.detach(), *gradients, *(whole(p) for p in model.parameters()), *(b.clone() for b in model.buffers())]


def whole(tensor: torch.Tensor | None) -> torch.Tensor:
    assert isinstance(tensor, DTensor)
    return tensor.full_tensor().detach()


def trained(rank: int, parts: str, policy: str, first: str, reshard: bool) -> None:
    naive = dense_net()
    if policy != "full precision":
        for norm in naive.modules():  # on a CPU a norm's buffers have the dtype of its parameters
            if isinstance(norm, nn.BatchNorm2d):
                norm.running_mean, norm.running_var = norm.running_mean.bfloat16(), norm.running_var.bfloat16()
    model = copy.deepcopy(naive)
    if first == "apply":
        memopt.apply(model)
    sharded(naive, parts, policy, reshard_after_forward=reshard)
    sharded(model, parts, policy, reshard_after_forward=reshard)
    if first == "shard":
        memopt.apply(model)
    for number in range(3):
        x = images(seed=10 * number + rank)
        expected, actual = step(naive, x), step(model, x)
        assert all(same_bits(a, b) for a, b in zip(expected, actual, strict=True))
    explanation = memopt.explain(model)
    assert explanation.ran
    # Where blocks are called as modules, the norms behind them read no concat that anybody can see.
    found = 5 if parts in ("per block", "a layer inside a block") else 7
    assert len(explanation.rewritten) == len(explanation.chains) == found, str(explanation)
    norms = [chain.module for chain in explanation.chains]
    assert norms == [name for name, _ in dense_net().named_modules() if name in norms]  # in order, by their whole names


@pytest.mark.parametrize("first", ["apply", "shard"])
@pytest.mark.parametrize("parts", PARTS)
def test_trains_as_eager_does(parts: str, first: str, ranks: Ranks) -> None:
    ranks.run(trained, parts, "full precision", first, True)


@pytest.mark.parametrize("policy", ["bfloat16", "bfloat16, results wide"])
@pytest.mark.parametrize("parts", ["per block", "the whole model"])
def test_mixed_precision(parts: str, policy: str, ranks: Ranks) -> None:
    ranks.run(trained, parts, policy, "apply", True)


def test_parameters_that_stay_whole_after_forward(ranks: Ranks) -> None:
    ranks.run(trained, "per block", "full precision", "apply", False)


def saved_bytes(rank: int, parts: str) -> list[int]:
    results = []
    for model in (sharded(dense_net(growth=8), parts), sharded(memopt.apply(dense_net(growth=8)), parts)):
        step(model, images(4, 12))
        sizes: list[int] = []
        with counted_saves(sizes):
            model(images(4, 12))
        results.append(sum(sizes))
    return results


@pytest.mark.parametrize("parts", PARTS)
def test_memory_is_saved_inside_what_is_sharded(parts: str, ranks: Ranks) -> None:
    for naive, ours in ranks.run(saved_bytes, parts):
        assert ours < 0.6 * naive


def removed(rank: int) -> None:
    model = sharded(memopt.apply(dense_net()), "per block")
    step(model, images(seed=rank))
    memopt.remove(model)
    assert not any("memopt" in str(vars(c)) for m in model.modules() for c in type(m).__mro__)
    naive = sharded(dense_net(), "per block")
    step(naive, images(seed=rank))
    x = images(seed=5 + rank)
    assert all(same_bits(a, b) for a, b in zip(step(naive, x), step(model, x), strict=True))


def test_remove(ranks: Ranks) -> None:
    ranks.run(removed)


def with_example_inputs(rank: int) -> str:
    model = sharded(dense_net(), "per block")
    with pytest.raises(memopt.CaptureError) as caught:
        memopt.apply(model, images())
    assert not memopt.explain(model).applied
    return str(caught.value)


def test_parameters_in_pieces_are_refused_with_the_remedy(ranks: Ranks) -> None:
    for message in ranks.run(with_example_inputs):
        assert "stem" in message
        assert "apply memopt without example inputs" in message


def blocks_alone(rank: int) -> tuple[str, ...]:
    """The root itself is not sharded: it can be recorded now, but not verified."""
    model = dense_net()
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    for part in per_block(model):
        fully_shard(part, mesh=mesh)
    memopt.apply(model, images())
    return memopt.explain(model).notes


def test_verification_does_not_wait_for_other_processes(ranks: Ranks) -> None:
    for notes in ranks.run(blocks_alone):
        assert "Not verified: FSDP2 would wait for the other processes." in notes


def accumulated(rank: int) -> None:
    """Gradients of two batches of different size, an evaluation between them, one reduction."""
    naive = dense_net()
    pair = sharded(naive, "per block"), sharded(memopt.apply(dense_net()), "per block")
    observed = []
    for model in pair:
        model.set_requires_gradient_sync(False)
        model(images(3, seed=rank)).square().sum().backward()
        model.eval()
        with torch.no_grad():
            outputs = [model(images(seed=2))]
        model.train()
        model.set_requires_gradient_sync(True)
        model(images(2, seed=5 + rank)).square().sum().backward()
        observed.append([*outputs, *(whole(p.grad) for p in model.parameters())])
    assert all(same_bits(a, b) for a, b in zip(*observed, strict=True))
    assert memopt.explain(pair[1]).ran


def test_accumulation_with_an_evaluation_between(ranks: Ranks) -> None:
    ranks.run(accumulated)


class Scaled(nn.Module):
    """Reads a list of its own in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = dense_net()
        self.scales = [1.0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x * self.scales[0])


def rescaled(rank: int) -> None:
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    pair = Scaled(), memopt.apply(Scaled())
    for model in pair:
        fully_shard(model, mesh=mesh)
    for scale in (1.0, 3.0):
        for model in pair:
            model.scales[0] = scale
        x = images(seed=rank)
        assert all(same_bits(a, b) for a, b in zip(*(step(model, x) for model in pair), strict=True))
    assert len(memopt.explain(pair[1]).rewritten) == 7


def test_values_that_a_sharded_module_reads_are_guarded(ranks: Ranks) -> None:
    ranks.run(rescaled)


def synchronised(rank: int) -> None:
    allow_on_cpu()
    make = nn.SyncBatchNorm.convert_sync_batchnorm
    pair = sharded(make(dense_net()), "per block"), sharded(memopt.apply(make(dense_net())), "per block")
    logs: tuple[list[str], list[str]] = ([], [])
    for number in range(2):
        observed = []
        for model, log in zip(pair, logs, strict=True):
            with collectives(log):
                observed.append(step(model, images(seed=10 * number + rank)))
        assert all(same_bits(a, b) for a, b in zip(*observed, strict=True))
    assert logs[0] == logs[1]
    assert any(entry.startswith("all_gather") for entry in logs[0])
    assert len(memopt.explain(pair[1]).rewritten) == 5


def test_with_sync_batch_norm(ranks: Ranks) -> None:
    ranks.run(synchronised)


def checkpointed(rank: int) -> None:
    """Sharded weights written by a rewritten model and read by a naive one."""
    model = sharded(memopt.apply(dense_net()), "per block")
    step(model, images(seed=rank))
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=False))
    other = sharded(dense_net(seed=1), "per block")
    if rank:
        state = {}
    set_model_state_dict(other, state, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    x = images(seed=5 + rank)
    expected, actual = step(other, x), step(model, x)
    own = 1 + 2 * len(list(model.parameters()))  # running statistics are rank 0's from now on
    assert all(same_bits(a, b) for a, b in zip(expected[:own], actual[:own], strict=True))


def test_distributed_checkpoints(ranks: Ranks) -> None:
    ranks.run(checkpointed)


def fused(rank: int) -> None:
    """On a CPU fused kernels are their references: the numbers are close, every rank's weights the same."""
    naive = sharded(dense_net(), "per block")
    model = sharded(memopt.apply(dense_net(), config=memopt.Config(numerics="fast")), "per block")
    for number in range(2):
        x = images(seed=10 * number + rank)
        for expected, actual in zip(step(naive, x), step(model, x), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
    assert [chain.numerics for chain in memopt.explain(model).rewritten] == ["fast"] * 5


def test_fused_kernels(ranks: Ranks) -> None:
    ranks.run(fused)

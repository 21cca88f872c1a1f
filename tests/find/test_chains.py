"""What counts as a chain, how many there are, and the reason wherever one is left alone."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import memopt
from densenet_models import bc, growing, plain, signal, volumetric
from tests.helpers import DenseBlock, assert_exact, images
from tests.helpers import plain as model_of


@pytest.mark.parametrize(
    ("make", "shape", "layers", "exits"),
    [
        (bc.DenseNet, (2, 3, 32, 32), 48, 3),
        (growing.DenseNet, (2, 3, 16, 16), None, 3),
        (lambda: growing.DenseNet(prepend=True), (2, 3, 16, 16), None, 3),
        (plain.DenseNet, (2, 3, 16, 16), 36, 3),
        (volumetric.DenseNet, (2, 1, 16, 16, 16), None, 3),
        (signal.DenseNet, (2, 12, 64), None, 3),
    ],
    ids=["bc", "growing", "prepended", "plain", "volumetric", "signal"],
)
def test_every_chain_of_the_shipped_models_is_rewritten(
    make: Callable[[], nn.Module], shape: tuple[int, ...], layers: int | None, exits: int
) -> None:
    model = memopt.apply(make(), torch.randn(shape), config=memopt.Config(verify=False))

    chains = memopt.explain(model).chains

    assert all(chain.action == "rewritten" for chain in chains)
    assert {chain.block for chain in chains} == set(range(1, exits + 1))
    assert sum(chain.role == "exit" for chain in chains) == exits
    if layers is not None:
        assert sum(chain.role == "layer" for chain in chains) == layers
    assert all(":" in chain.source for chain in chains)


def _explained(body: Callable[..., torch.Tensor], x: torch.Tensor, **parts: Callable[[], nn.Module]) -> list[str]:
    model = memopt.apply(model_of(body, **parts), x)
    return [chain.reason or "rewritten" for chain in memopt.explain(model).chains]


def test_a_concat_of_another_dimension_is_no_chain_and_says_so() -> None:
    def body(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return m.conv(F.relu(m.norm(torch.cat([x, x], 2))))

    parts = {"norm": lambda: nn.BatchNorm2d(3), "conv": lambda: nn.Conv2d(3, 2, 1)}

    assert _explained(body, images(), **parts) == ["concatenates dimension 2, not channels"]


def test_hooks_inside_a_chain_leave_it_alone() -> None:
    def hooked() -> nn.Module:
        norm = nn.BatchNorm2d(6)
        norm.register_forward_hook(lambda module, inputs, output: None)
        return norm

    def body(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return m.conv(F.relu(m.norm(torch.cat([x, x], 1))))

    assert _explained(body, images(), norm=hooked, conv=lambda: nn.Conv2d(6, 2, 1)) == [
        "BatchNorm2d has hooks, which recomputing would skip"
    ]


def test_synchronised_norms_with_a_forward_of_their_own_are_looked_into() -> None:
    class Shifted(nn.SyncBatchNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1

    def body(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return m.conv(F.relu(m.norm(torch.cat([x, x], 1))))

    model = model_of(body, norm=lambda: Shifted(6), conv=lambda: nn.Conv2d(6, 2, 1))
    assert_exact(model, images())


@pytest.mark.parametrize("look_alike", ["u-net", "residual", "batch concat"])
def test_look_alikes_have_no_chain(look_alike: str) -> None:
    def u_net(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return F.relu(m.norm(m.conv(torch.cat([x, x], 1))))

    def residual(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return x + F.relu(m.norm(m.conv(torch.cat([x, x], 1))))[:, :3]

    def batch_concat(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return F.relu(m.norm(m.conv(torch.cat([torch.cat([x, x], 0)] * 2, 1))))

    bodies = {"u-net": u_net, "residual": residual, "batch concat": batch_concat}
    parts = {"norm": lambda: nn.BatchNorm2d(4), "conv": lambda: nn.Conv2d(6, 4, 1)}
    if look_alike == "residual":
        parts = {"norm": lambda: nn.BatchNorm2d(3), "conv": lambda: nn.Conv2d(6, 3, 1)}

    assert _explained(bodies[look_alike], images(), **parts) == []


@pytest.mark.parametrize("join", [torch.cat, torch.concat, torch.concatenate, torch.hstack])
def test_every_spelling_of_a_concat_is_found(join: Callable[..., torch.Tensor]) -> None:
    def body(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        pair = [x, 2 * x]
        return m.conv(F.relu(m.norm(join(pair) if join is torch.hstack else join(pair, 1))))

    parts = {"norm": lambda: nn.BatchNorm2d(6), "conv": lambda: nn.Conv2d(6, 2, 1)}
    assert _explained(body, images(), **parts) == ["rewritten"]
    assert_exact(model_of(body, **parts), images())


def _average(f: torch.Tensor) -> torch.Tensor:
    return F.adaptive_avg_pool2d(f, 1).flatten(1)


def _largest(f: torch.Tensor) -> torch.Tensor:
    return f.amax((2, 3))


HEADS: dict[str, Callable[[nn.Module, torch.Tensor], torch.Tensor]] = {
    "one": lambda m, f: torch.cat([f.mean((2, 3))], 1),
    "metadata": lambda m, f: torch.cat([f.mean((2, 3)), f.new_ones(len(f), 3)], 1),
    "average and largest": lambda m, f: torch.cat([_average(f), _largest(f)], 1),
    "pooled, then flattened": lambda m, f: torch.cat([F.adaptive_avg_pool2d(f, 1), f.amax((2, 3), True)], 1).flatten(1),
    "normalised": lambda m, f: m.vectors(torch.cat([_average(f), _largest(f)], 1)),
}


@pytest.mark.parametrize("head", HEADS)
def test_a_head_that_joins_pooled_features_is_no_layer_of_its_block(head: str) -> None:
    def body(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return HEADS[head](m, F.relu(m.norm(m.block(x))))

    parts = {"block": lambda: DenseBlock(3, 4, 3), "norm": lambda: nn.BatchNorm2d(15), "vectors": nn.Identity}
    if head == "normalised":
        parts["vectors"] = lambda: nn.Sequential(nn.BatchNorm1d(30), nn.Dropout(0.5), nn.Linear(30, 2))
    model = memopt.apply(model_of(body, **parts), images(), config=memopt.Config(numerics="fast", verify=False))
    explained = memopt.explain(model)

    assert [chain.role for chain in explained.chains if chain.block == 1] == ["layer"] * 3 + ["exit"]
    assert "Dense block 1 runs exactly" not in str(explained)
    assert_exact(model_of(body, **parts), images())

"""The backend of torch.compile: it is found by its name, saves memory and changes no bit."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import memopt
from memopt.dynamo import backend
from tests.helpers import DenseNet, assert_same, counted_saves, dense_net, images, train_step
from tests.wild.models import Net

# Dynamo's own tracing warns about what it does not follow.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


class Controlled(DenseNet):
    """Control flow on values and a counter: nothing that one graph could hold."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        if x.sum() > 1e6:
            x = -x
        return super().forward(x) * min(1.0, self.steps / 10)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _model(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind()


def test_it_is_registered() -> None:
    assert "memopt" in torch._dynamo.list_backends()


@pytest.mark.parametrize("kind", [DenseNet, Net, Controlled])
def test_a_compiled_model_trains_to_the_bit(kind: type[nn.Module]) -> None:
    naive = _model(kind)
    compiled = copy.deepcopy(naive)
    compiled.compile(backend="memopt")

    for batch in (images(2), images(3), images(2)):
        assert_same(train_step(naive, (batch,)), train_step(compiled, (batch,)))
    assert getattr(naive, "steps", None) == getattr(compiled, "steps", None)


@pytest.mark.parametrize("kind", [DenseNet, Controlled])
def test_a_compiled_model_saves_memory(kind: type[nn.Module]) -> None:
    naive, compiled = _model(kind), _model(kind)
    compiled.compile(backend="memopt")
    saved: list[list[int]] = []
    for model in (naive, compiled):
        model(images(8, 8))
        sizes: list[int] = []
        with counted_saves(sizes):
            model(images(8, 8))
        saved.append(sizes)

    assert sum(saved[1]) < 0.6 * sum(saved[0])


def test_options_are_the_fields_of_the_configuration() -> None:
    graph = torch.fx.symbolic_trace(nn.Identity())

    with pytest.raises(memopt.ConfigError, match="numerics"):
        backend(graph, [], options={"numerics": "bold"})


def test_chains_name_the_users_lines() -> None:
    graphs: list[nn.Module] = []

    def kept(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(backend(graph, inputs))
        return graphs[-1]

    train_step(torch.compile(dense_net(), backend=kept), (images(),))

    chains = memopt.explain(graphs[0]).rewritten
    assert len(chains) == 7
    assert all("helpers.py:" in chain.source for chain in chains)

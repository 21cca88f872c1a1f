"""The modules of a rewritten forward are the live ones, each read when it is called."""

import copy

import pytest
import torch
from torch import fx, nn

from memopt.rewrite.live import look_up_at_once


def test_modules_and_tensors_are_found_on_the_root_that_is_given() -> None:
    root = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.BatchNorm1d(2))
    graph = fx.Graph()
    x = graph.placeholder("x")
    x = graph.call_module("0.0", (x,))
    graph.output((graph.call_module("1", (x,)), graph.get_attr("0.0.weight"), graph.get_attr("1")))
    find = look_up_at_once(graph)
    namespace: dict[str, object] = {}
    source = graph.python_code("self")
    exec(source.src, source.globals, namespace)

    for model in (root, copy.deepcopy(root)):
        y, weight, norm = namespace["forward"](find(model), torch.ones(3, 2))  # type: ignore[operator]
        assert torch.equal(y, model(torch.ones(3, 2)))
        assert weight is model[0][0].weight
        assert norm is model[1]
    root[1] = nn.Identity()
    assert find(root)._0 is root[0][0]
    del root[0]
    with pytest.raises(AttributeError):
        find(root)


def test_a_computed_tensor_is_computed_where_it_is_read() -> None:
    class Counting(nn.Module):
        reads = 0

        @property
        def weight(self) -> torch.Tensor:
            self.reads += 1
            return torch.ones(1)

    graph = fx.Graph()
    graph.output((graph.get_attr("weight"), graph.get_attr("weight")))
    find = look_up_at_once(graph)
    source = graph.python_code("self")
    namespace: dict[str, object] = {}
    exec(source.src, source.globals, namespace)
    model = Counting()
    live = find(model)
    assert model.reads == 0
    namespace["forward"](live)  # type: ignore[operator]
    assert model.reads == 2

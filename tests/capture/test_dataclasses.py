"""What a forward may take and return: trees and dataclasses are built again at each call, nothing else is guessed."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import memopt
from tests.helpers import assert_same, dense_net, images, rewritten_copy


@dataclass
class Scores:
    """With an attribute that is no field and a method that a user may call."""

    logits: torch.Tensor
    name: str = "scores"
    parts: dict[str, list[torch.Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.doubled = self.logits * 2


@dataclass(frozen=True, slots=True)
class Frozen:
    """Of another dataclass."""

    scores: Scores
    count: int


class Plain:
    """No dataclass."""

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits


@dataclass
class Fields(dict[str, torch.Tensor]):
    """As some libraries' results are: a dict and a dataclass at once."""

    logits: torch.Tensor


class Returning(nn.Module):
    """A dense net whose scores are wrapped."""

    def __init__(self, wrap: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.inner = dense_net()
        self.wrap = wrap

    def forward(self, x: torch.Tensor) -> Any:
        return self.wrap(F.log_softmax(self.inner(x), 1))


def nested(x: torch.Tensor) -> Any:
    return {"all": (Frozen(Scores(x, "named", {"both": [x.sum(), x.mean()]}), len(x)), None)}


def losses_and_gradients(model: nn.Module, logits: Callable[[Any], torch.Tensor]) -> dict[str, torch.Tensor]:
    result = logits(model(images()))
    result.square().sum().backward()
    return {"result": result.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("wrap", [Scores, nested], ids=["dataclass", "nested"])
def test_dataclasses_are_rebuilt(wrap: Callable[[torch.Tensor], Any]) -> None:
    def scores(result: Any) -> Any:
        return result if wrap is Scores else result["all"][0].scores

    naive = Returning(wrap)
    model = rewritten_copy(naive)
    for _ in range(2):
        assert_same(*(losses_and_gradients(m, lambda result: scores(result).doubled) for m in (naive, model)))
        first, second = model(images()), model(images())
        assert type(first) is type(naive(images()))
        assert scores(first) is not scores(second)
        assert scores(first).logits.grad_fn is not None
        assert scores(first).name == ("scores" if wrap is Scores else "named")
        if wrap is nested:
            kept = first["all"][0]
            assert (type(kept), kept.count, first["all"][1]) == (Frozen, 2, None)
            assert scores(first).parts["both"][0].grad_fn is not None
    assert len(memopt.explain(model).rewritten) == 7


@pytest.mark.parametrize("wrap", [Plain, Fields, lambda x: lambda: x], ids=["object", "dict and dataclass", "function"])
def test_what_cannot_be_looked_into_is_made_by_the_users_forward(wrap: Callable[[torch.Tensor], Any]) -> None:
    def logits(result: Any) -> Any:
        return result.logits if hasattr(result, "logits") else result()

    naive = Returning(wrap)
    model = memopt.apply(copy.deepcopy(naive))
    with pytest.warns(UserWarning, match="cannot be recorded"):
        found = losses_and_gradients(model, logits)

    assert_same(losses_and_gradients(naive, logits), found)
    assert len(memopt.explain(model).rewritten) == 7


@dataclass
class Sample:
    """What a loader may hand over."""

    image: torch.Tensor
    scale: float = 1.0
    weights: list[torch.Tensor] | None = None
    seen: int = 0


class Taking(nn.Module):
    """A dense net that takes its images inside a dataclass."""

    def __init__(self, counts: bool = False) -> None:
        super().__init__()
        self.inner = dense_net()
        self.counts = counts

    def forward(self, sample: Sample) -> torch.Tensor:
        sample.seen += self.counts
        result = self.inner(sample.image) * sample.scale
        return result if sample.weights is None else result * sample.weights[0]


def gradients(model: nn.Module, sample: Sample) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(sample).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_dataclasses_as_inputs_are_recorded() -> None:
    naive = Taking()
    model = rewritten_copy(naive)
    weights = torch.rand(5, requires_grad=True)
    samples = [Sample(images()), Sample(images(seed=2)), Sample(images(), 0.5), Sample(images(3), 0.5, [weights])]
    for sample in samples:
        assert_same(*(gradients(m, sample) for m in (naive, model)))
    assert len(memopt.explain(model).rewritten) == 7
    assert_same(
        {"weights": weights.grad / 2}, {"weights": torch.autograd.grad(naive(samples[3]).square().sum(), weights)[0]}
    )


def test_such_a_model_is_compared_and_its_dataclass_makes_the_loss() -> None:
    comparison = memopt.compare(lambda: Returning(nested), images(), measure=False)

    assert comparison.equivalence is not None
    assert comparison.equivalence.passed
    assert comparison.predicted_after is not None
    assert comparison.predicted_after.activation_peak_bytes is not None


def test_a_forward_that_changes_such_an_input_is_left_alone() -> None:
    naive = Taking(counts=True)
    model = memopt.apply(copy.deepcopy(naive))
    sample = Sample(images())
    with pytest.warns(UserWarning, match="forward changes one of its arguments"):
        found = gradients(model, sample)
    assert sample.seen == 1
    assert_same(gradients(naive, sample), found)

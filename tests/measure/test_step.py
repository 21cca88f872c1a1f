import pytest
import torch
import torch.nn.functional as F
from torch import nn

from memopt.measure import StepError
from memopt.measure.step import TrainingStep, forward_and_loss, loss_of, seeded


def test_two_runs_from_one_seed_are_equal(make_tiny, images) -> None:
    def train() -> dict[str, torch.Tensor]:
        with seeded(3, torch.device("cpu")):
            step = TrainingStep(make_tiny(drop_rate=0.5), images)
            step.run()
            step.run()
        return step.model.state_dict()

    first = train()
    torch.rand(1)
    second = train()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_seeding_leaves_the_callers_random_numbers_alone() -> None:
    state = torch.get_rng_state()
    with seeded(3, torch.device("cpu")):
        torch.rand(5)
    assert torch.equal(torch.get_rng_state(), state)


def test_step_is_sgd_with_momentum_and_leaves_no_gradients(make_tiny, images) -> None:
    with seeded(0, torch.device("cpu")):
        model, by_hand = make_tiny(), make_tiny()
    by_hand.load_state_dict(model.state_dict())
    step = TrainingStep(model, images)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.01, momentum=0.9)
    for _ in range(2):
        step.run()
        assert all(parameter.grad is None for parameter in model.parameters())
        optimizer.zero_grad()
        forward_and_loss(by_hand, images)[1].backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), by_hand.parameters(), strict=True))


def test_autocast_reaches_the_model(make_tiny, images) -> None:
    outputs, loss = forward_and_loss(make_tiny(), images, torch.bfloat16)
    assert outputs.dtype == torch.bfloat16
    assert loss.dtype == torch.float32


def test_logits_get_cross_entropy_with_fixed_classes() -> None:
    logits = torch.randn(64, 10, requires_grad=True)
    before = torch.get_rng_state()
    loss = loss_of(logits)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(loss, loss_of(logits))
    # log(10) is the cross-entropy of logits that know nothing.
    assert loss_of(torch.zeros(64, 10, requires_grad=True)).item() == pytest.approx(2.302585)
    classes = {int(F.one_hot(torch.tensor(i), 10).argmax()) for i in range(10)}
    loss.backward()
    assert set((logits.grad < 0).nonzero()[:, 1].tolist()) == classes


@pytest.mark.parametrize("shape", [(4, 10, 8, 8), (4,), (4, 1), (2, 3, 4)])
def test_other_outputs_get_their_mean(shape: tuple[int, ...]) -> None:
    output = torch.randn(shape, requires_grad=True)
    assert torch.allclose(loss_of(output), output.mean())


def test_nested_outputs_get_the_sum_of_the_means() -> None:
    first, second = torch.ones(2, 3, requires_grad=True), torch.full((5,), 3.0)
    outputs = {"a": [first, None], "b": (second, torch.tensor([1, 2]))}
    assert loss_of(outputs).item() == 4.0


@pytest.mark.parametrize("shape", [(4, 10), (4,)])
def test_the_loss_of_low_precision_is_in_single_precision(shape: tuple[int, ...]) -> None:
    assert loss_of(torch.ones(shape, dtype=torch.bfloat16, requires_grad=True)).dtype == torch.float32
    assert loss_of(torch.ones(shape, dtype=torch.float64, requires_grad=True)).dtype == torch.float64


@pytest.mark.parametrize("outputs", [torch.ones(3), torch.tensor([1]), None, {"a": torch.ones(2, 10)}])
def test_refuses_outputs_without_a_loss(outputs: object) -> None:
    with pytest.raises(StepError, match="no loss can be made"):
        loss_of(outputs)


def test_refuses_a_model_with_nothing_to_train() -> None:
    with pytest.raises(StepError, match=r"Linear has no parameter that requires a gradient.*Unfreeze"):
        TrainingStep(nn.Linear(2, 2).requires_grad_(False), ())

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from densenet_models.train import (
    PADDING_LABEL,
    Batch,
    DivergedError,
    EpochResult,
    Progress,
    Recipe,
    Score,
    Trainer,
    evaluate,
    fit,
    seed_of,
)


def net(dropout: float = 0.3) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(dropout), nn.Flatten(), nn.Linear(64, 5)
    )


def batch(number: int) -> Batch:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(8, 3, 6, 6, generator=generator), torch.randint(0, 5, (8,), generator=generator)


def batches(epoch: int, first: int = 0) -> Iterator[Batch]:
    return (batch(10 * epoch + number) for number in range(first, 4))


def validation() -> list[Batch]:
    return [batch(1000)]


def state_of(trainer: Trainer) -> list[torch.Tensor]:
    momentum = [s["momentum_buffer"] for s in trainer.optimizer.state_dict()["state"].values()]
    return [*(t.clone() for t in trainer.model.state_dict().values()), *momentum]


def test_rate_drops_after_half_and_three_quarters() -> None:
    rates = [Recipe(epochs=8, learning_rate=0.1).rate(epoch) for epoch in range(8)]
    assert rates == pytest.approx([0.1] * 4 + [0.01] * 2 + [0.001] * 2)


def test_optimiser_follows_the_recipe() -> None:
    recipe = Recipe(epochs=4, learning_rate=0.2)
    trainer = Trainer(net(), recipe)
    seen: list[float] = []
    fit(trainer, batches, validation, on_step=lambda done: seen.append(trainer.optimizer.param_groups[0]["lr"]))
    assert seen == [recipe.rate(epoch) for epoch in range(4) for _ in range(4)]
    (group,) = trainer.optimizer.param_groups
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.9, True, 1e-4)


def test_a_step_is_sgd_with_nesterov_momentum() -> None:
    """Written out by hand for the first two steps of a linear model."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 5))
    weight = model[1].weight.detach().clone().requires_grad_()
    bias = model[1].bias.detach().clone().requires_grad_()
    buffer = None
    for number in range(2):
        images, labels = batch(number)
        loss = nn.functional.cross_entropy(images.flatten(1) @ weight.T + bias, labels)
        pairs = zip(torch.autograd.grad(loss, [weight, bias]), [weight, bias], strict=True)
        gradients = [gradient + 1e-4 * parameter for gradient, parameter in pairs]
        buffer = gradients if buffer is None else [0.9 * b + g for b, g in zip(buffer, gradients, strict=True)]
        with torch.no_grad():
            for parameter, gradient, b in zip([weight, bias], gradients, buffer, strict=True):
                parameter -= 0.1 * (gradient + 0.9 * b)
    trainer = Trainer(model, Recipe(epochs=9))
    trainer.train([batch(0), batch(1)], lambda done: None, lambda: False)
    torch.testing.assert_close(model[1].weight, weight)
    torch.testing.assert_close(model[1].bias, bias)


@pytest.mark.parametrize("stop_after", [1, 3, 4, 6, 8])
def test_stopped_and_resumed_is_never_stopped(stop_after: int) -> None:
    """Dropout, running statistics, momentum and the sums of the epoch included."""
    recipe = Recipe(epochs=3, seed=5)
    whole = Trainer(net(), recipe)
    assert fit(whole, batches, validation)

    first = Trainer(net(), recipe)
    steps: list[int] = []
    assert not fit(first, batches, validation, on_step=steps.append, should_stop=lambda: len(steps) >= stop_after)
    assert len(steps) == stop_after
    torch.rand(7)  # what happens in between must not matter
    second = Trainer(copy.deepcopy(first.model), recipe)
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.go_on_from(first.progress())
    assert fit(second, batches, validation)

    assert second.history == whole.history
    assert all(torch.equal(a, b) for a, b in zip(state_of(whole), state_of(second), strict=True))


def test_results_are_means_over_images() -> None:
    trainer = Trainer(net(dropout=0.0), Recipe(epochs=1, learning_rate=1e-12))
    fit(trainer, batches, validation)
    (result,) = trainer.history
    losses, errors = [], []
    model = net(dropout=0.0)
    for images, labels in batches(0):
        logits = model(images)
        losses.append(nn.functional.cross_entropy(logits, labels).item())
        errors.append((logits.argmax(1) != labels).float().mean().item())
    assert result.train.loss == pytest.approx(sum(losses) / 4, rel=1e-5)
    assert result.train.error == pytest.approx(sum(errors) / 4)
    assert EpochResult.from_dict(result.as_dict()) == result


def test_filled_up_images_count_for_nothing() -> None:
    model = net()
    images, labels = batch(0)
    padded = torch.cat([labels[:5], torch.full((3,), PADDING_LABEL)])
    assert evaluate(model, [(images, padded)]) == evaluate(model, [(images[:5], labels[:5])])
    assert not model.training


def test_nothing_but_padding_is_no_division_by_zero() -> None:
    images, labels = batch(0)
    assert evaluate(net(), [(images, torch.full_like(labels, PADDING_LABEL))]) == Score(0.0, 0.0)


def test_divergence_is_an_error() -> None:
    trainer = Trainer(net(), Recipe(epochs=2, learning_rate=1e30))
    with pytest.raises(DivergedError, match=r"the loss is (nan|inf) in epoch 1"):
        fit(trainer, batches, validation)


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
def test_trains_under_autocast(amp: torch.dtype) -> None:
    seen: list[torch.dtype] = []
    model = net()
    model[0].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    trainer = Trainer(model, Recipe(epochs=1, amp=amp))
    before = state_of(trainer)
    fit(trainer, batches, validation)
    assert set(seen) == {amp}
    assert trainer.scaler.is_enabled() is (amp is torch.float16)
    assert not torch.equal(before[0], model[0].weight)


def test_frozen_parameters_stay() -> None:
    model = net()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    fit(Trainer(model, Recipe(epochs=1)), batches, validation)
    assert torch.equal(model[0].weight, before)


def test_seeds_depend_on_every_part() -> None:
    seeds = {seed_of(*parts) for parts in ((0, 1, 2), (0, 2, 1), (1, 1, 1), (0, 1), (0, 1, "2"), (0, 1, 2, 0))}
    assert len(seeds) == 6
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_progress_of_a_new_trainer_is_the_beginning() -> None:
    assert Trainer(net(), Recipe()).progress() == Progress()

"""Training loops as people write them, for some epochs, naive and rewritten: the same weights to the bit."""

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

import memopt
from tests.helpers import assert_rewritten, assert_same, dense_net, images, rewritten_copy, state_of

CLASSES = 5


def batches(epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Three batches, the last of them smaller."""
    for number, size in enumerate((4, 4, 3)):
        seed = 10 * epoch + number
        generator = torch.Generator().manual_seed(seed)
        yield images(size, seed=seed), torch.randint(CLASSES, (size,), generator=generator)


class Average:
    """An exponential moving average of a model, as timm's `ModelEmaV2` keeps it."""

    def __init__(self, model: nn.Module, decay: float = 0.9) -> None:
        self.module = copy.deepcopy(model).eval()
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for mine, theirs in zip(self.module.state_dict().values(), model.state_dict().values(), strict=True):
            mine.copy_(self.decay * mine + (1.0 - self.decay) * theirs)


@torch.no_grad()
def validate(model: nn.Module) -> torch.Tensor:
    model.eval()
    return torch.stack([F.cross_entropy(model(x), y) for x, y in batches(100)])


def in_timms_way(model: nn.Module) -> dict[str, torch.Tensor | None]:
    """Mixed precision with a scaler, clipping, accumulation, an average of the weights, resuming from a checkpoint."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    average = Average(model)
    losses: list[torch.Tensor] = []
    for epoch in range(3):
        model.train()
        for index, (x, y) in enumerate(batches(epoch)):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = F.cross_entropy(model(x), y, label_smoothing=0.1)
            scaler.scale(loss).backward()
            losses.append(loss.detach())
            if index == 1:
                continue  # accumulate
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            average.update(model)
        scheduler.step()
        losses += [*validate(model), *validate(average.module)]
        if epoch == 0:
            _resume(model, optimizer, scheduler, scaler)
    observed = state_of(model) | {f"average {k}": v for k, v in average.module.state_dict().items()}
    return observed | {
        "losses": torch.stack([loss.float() for loss in losses]),
        "scale": torch.tensor(scaler.get_scale()),
    }


def _resume(*parts: Any) -> None:
    """Write everything to a checkpoint and read it back."""
    file = io.BytesIO()
    torch.save([part.state_dict() for part in parts], file)
    file.seek(0)
    for part, state in zip(parts, torch.load(file), strict=True):
        part.load_state_dict(state)


class Lightning(nn.Module):
    """The shape of a LightningModule."""

    def __init__(self, net: nn.Module, through_forward: bool) -> None:
        super().__init__()
        self.net = net
        self.through_forward = through_forward
        self.logged: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], index: int) -> torch.Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x) if self.through_forward else self.net(x), y)
        self.logged.append(loss.detach())
        return loss

    def validation_step(self, batch: tuple[torch.Tensor, torch.Tensor], index: int) -> None:
        self.logged.append(F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def fit(module: Lightning) -> dict[str, torch.Tensor | None]:
    """As Lightning's automatic optimisation does it: the step is a closure of the optimiser; a sanity check first."""
    optimizer = module.configure_optimizers()

    def validation() -> None:
        module.eval()
        with torch.inference_mode():
            for index, batch in enumerate(batches(100)):
                module.validation_step(batch, index)
        module.train()

    validation()
    for epoch in range(2):
        for index, batch in enumerate(batches(epoch)):

            def closure(batch: Any = batch, index: int = index) -> torch.Tensor:
                loss = module.training_step(batch, index)
                optimizer.zero_grad()
                loss.backward()
                return loss

            optimizer.step(closure)
        validation()
    return state_of(module) | {"losses": torch.stack([loss.clone() for loss in module.logged])}


@pytest.mark.parametrize("level", ["layer", "concat"])
def test_timm(level: str) -> None:
    naive = dense_net()
    model = rewritten_copy(naive, level)
    assert_same(in_timms_way(naive), in_timms_way(model))
    assert_rewritten(model, 7)


@pytest.mark.parametrize("applied_to", ["module", "net"])
def test_lightning(applied_to: str) -> None:
    naive = Lightning(dense_net(), through_forward=applied_to == "module")
    module = copy.deepcopy(naive)
    target = memopt.apply(module if applied_to == "module" else module.net)

    assert_same(fit(naive), fit(module))

    assert_rewritten(target, 7)


def test_explain_says_when_training_enters_elsewhere() -> None:
    module = memopt.apply(Lightning(dense_net(), through_forward=False))
    naive = Lightning(dense_net(), through_forward=False)

    assert_same(fit(naive), fit(module))

    explanation = memopt.explain(module)
    assert not explanation.ran
    assert "Nothing is recorded yet" in explanation.notes[0]


def test_an_average_can_be_trained_further() -> None:
    naive, model = dense_net(), rewritten_copy(dense_net())
    averages = []
    for each in (naive, model):
        each(images()).square().mean().backward()
        average = Average(each)
        average.update(each)
        average.module.train().zero_grad()
        average.module(images()).square().mean().backward()
        averages.append(average.module)
    assert_same(*map(state_of, averages))
    assert_rewritten(averages[1], 7)
    assert all(a is not b for a, b in zip(model.parameters(), averages[1].parameters(), strict=True))


def test_swa_averaged_model() -> None:
    """torch's own `AveragedModel` copies the model, too."""
    observed = []
    for model in (dense_net(), rewritten_copy(dense_net())):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        average = torch.optim.swa_utils.AveragedModel(model, use_buffers=False)
        for x, y in batches(0):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            average.update_parameters(model)
        torch.optim.swa_utils.update_bn([x for x, _ in batches(0)], average)
        observed.append(state_of(average))
    assert_same(*observed)


def test_scaler_skips_a_step_whose_gradients_overflow() -> None:
    observed = []
    for model in (dense_net(), rewritten_copy(dense_net())):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14, growth_interval=100)
        scales = []
        for factor in (1.0, float("inf"), 1.0):
            scaler.scale(model(images()).square().mean() * factor).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            scales.append(scaler.get_scale())
        assert scales == [2.0**14, 2.0**13, 2.0**13]
        observed.append(state_of(model))
    assert_same(*observed)


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "classifier replaced": lambda model: setattr(model, "classifier", nn.Linear(16, 2)),
    "classifier taken off": lambda model: setattr(model, "classifier", nn.Identity()),
    "stem frozen": lambda model: model.stem.requires_grad_(False),
    "blocks frozen": lambda model: [b.requires_grad_(False).eval() for b in (model.block1, model.transition)],
    "weights shared": lambda model: setattr(
        model.block1.layers[1].norm2, "weight", model.block1.layers[0].norm2.weight
    ),
    "weight norm": lambda model: parametrizations.weight_norm(model.classifier),
    "spectral norm inside a block": lambda model: parametrizations.spectral_norm(model.block1.layers[1].conv2),
    "pruned": lambda model: prune.l1_unstructured(model.block1.layers[1].conv1, "weight", amount=0.5),
}


@pytest.mark.parametrize("change", CHANGES)
def test_fine_tuning_changes_between_steps(change: str) -> None:
    """What people do to a pretrained model, done to one that has trained a step already."""
    observed = []
    for model in (dense_net(), rewritten_copy(dense_net())):
        model(images()).square().mean().backward()
        torch.manual_seed(3)
        CHANGES[change](model)
        for step in range(2):
            model.zero_grad()
            model(images(seed=step)).square().mean().backward()
        observed.append(state_of(model))
    assert_same(*observed)
    assert_rewritten(model, 3)

"""Does it train the same? A short run here; the committed rows of `tests/bench/convergence.py` are longer ones."""

import csv
import statistics
from pathlib import Path

import pytest
import torch
from torch import nn

import memopt
from densenet_models import bc
from tests.digits import Change, differs_beyond_noise, roughly, small_digits, train_digits

CPU = torch.device("cpu")
RESULTS = Path(__file__).parents[1] / "bench" / "results" / "convergence.csv"


def make() -> nn.Module:
    return bc.DenseNet(depth=10, growth_rate=4, num_init_features=8)


def applied(numerics: str) -> Change:
    return lambda model: memopt.apply(model, config=memopt.Config(numerics=numerics))


def plain(model: nn.Module) -> nn.Module:
    return model


@pytest.fixture(scope="module")
def trained() -> dict[str, list[float]]:
    """Loss of 5 seeds after two epochs of small images, by variant."""
    data = small_digits(size=8, images=320)
    changes = {"naive": plain, "rough": roughly, "fast": applied("fast"), "wrong": wrong}
    options = {"steps": 40, "epochs": 2, "device": CPU, "data": data, "batch_size": 16}
    return {
        name: [train_digits(make, change, seed, **options).train.loss for seed in range(5)]  # type: ignore[arg-type]
        for name, change in changes.items()
    }


def wrong(model: nn.Module) -> nn.Module:
    """Gradients of the features five percent too small, as of a kernel with a fault."""
    for name, module in model.named_modules():
        if name.endswith("conv2"):
            module.register_full_backward_hook(lambda module, inputs, outputs: (0.95 * inputs[0],))
    return model


def test_naive_and_exact_end_with_identical_weights() -> None:
    data = small_digits(size=8, images=320)
    options = {"steps": 40, "epochs": 2, "device": CPU, "data": data, "batch_size": 16}
    first, second = (train_digits(make, change, 0, **options) for change in (plain, applied("exact")))
    assert first == second


def test_fast_ends_within_noise_of_naive(trained: dict[str, list[float]]) -> None:
    assert max(trained["naive"]) < 2.2, "it must have learned something"
    assert differs_beyond_noise(trained["naive"], trained["rough"], trained["fast"]) is None


def test_a_small_fault_in_gradients_is_beyond_noise(trained: dict[str, list[float]]) -> None:
    assert differs_beyond_noise(trained["naive"], trained["rough"], trained["wrong"]) is not None


SMALL, USUAL = "DenseNet-BC-16 (k = 6)", "DenseNet-BC-40 (k = 12)"
Rows = dict[str, list[dict[str, str]]]


def rows_of(model: str) -> Rows:
    """Committed rows by variant, a seed each."""
    with RESULTS.open(newline="") as file:
        found = [row for row in csv.DictReader(file) if row["model"] == model]
    found.sort(key=lambda row: int(row["seed"]))
    return {variant: [row for row in found if row["variant"] == variant] for variant in {r["variant"] for r in found}}


@pytest.fixture(params=[SMALL, USUAL])
def rows(request: pytest.FixtureRequest) -> Rows:
    return rows_of(request.param)


def test_committed_runs_are_complete(rows: Rows) -> None:
    assert rows.keys() >= {"naive", "rough", "fast"}
    assert len({row["steps"] for runs in rows.values() for row in runs}) == 1
    for runs in rows.values():
        assert [row["seed"] for row in runs] == ["0", "1", "2", "3", "4"]
        assert all(row["torch"] and row["commit"] and row["date"] and row["device"] for row in runs)


def test_committed_exact_runs_end_with_the_weights_of_naive_ones() -> None:
    digests = {variant: [row["digest"] for row in runs] for variant, runs in rows_of(SMALL).items()}
    assert digests["exact"] == digests["naive"]
    assert not set(digests["rough"]) & set(digests["naive"])


@pytest.mark.parametrize("figure", ["train_loss", "test_error"])
def test_committed_fast_runs_are_within_noise(rows: Rows, figure: str) -> None:
    values = {variant: [float(row[figure]) for row in runs] for variant, runs in rows.items()}
    assert differs_beyond_noise(values["naive"], values["rough"], values["fast"]) is None
    means = {variant: statistics.mean(each) for variant, each in values.items()}
    assert means["fast"] == pytest.approx(means["naive"], abs=2 * statistics.stdev(values["naive"]))

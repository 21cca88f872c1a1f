"""What all files of `densenet_models` promise together."""

import ast
import copy
import importlib
import inspect
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import densenet_models

FOLDER = Path(densenet_models.__file__).parent
FILES = sorted(path for path in FOLDER.glob("*.py") if path.stem != "__init__")
NETWORKS = [path for path in FILES if path.stem != "train"]

# Shape of a batch for each network.
INPUTS = {
    "bc": (4, 3, 16, 16),
    "growing": (4, 3, 16, 16),
    "plain": (4, 3, 16, 16),
    "signal": (4, 12, 64),
    "volumetric": (4, 1, 16, 16, 16),
}


def build(name: str, **arguments: object) -> nn.Module:
    return importlib.import_module(f"densenet_models.{name}").DenseNet(**arguments)


def tiny(name: str, **arguments: object) -> nn.Module:
    return build(name, growth_rate=3, block_config=(2, 2), num_init_features=4, **arguments)


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def test_every_file_is_tested_and_listed() -> None:
    assert [path.stem for path in NETWORKS] == sorted(INPUTS)
    for path in FILES:
        assert f"`{path.name}`" in (densenet_models.__doc__ or "")
        assert (Path(__file__).parent / f"test_{path.name}").exists()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_stands_alone(path: Path) -> None:
    roots = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            roots |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            roots.add((node.module or "").partition(".")[0])
    assert roots - sys.stdlib_module_names == {"torch"}


@pytest.mark.parametrize("path", NETWORKS, ids=lambda path: path.stem)
def test_runs_as_a_copied_file(path: Path, tmp_path: Path) -> None:
    copy_of_it = tmp_path / f"copied_{path.name}"
    copy_of_it.write_bytes(path.read_bytes())
    spec = importlib.util.spec_from_file_location(copy_of_it.stem, copy_of_it)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with torch.device("meta"):
        assert isinstance(module.DenseNet(), nn.Module)


@pytest.mark.parametrize("name", INPUTS)
def test_constructible_without_arguments(name: str) -> None:
    signature = inspect.signature(importlib.import_module(f"densenet_models.{name}").DenseNet)
    assert all(p.default is not p.empty for p in signature.parameters.values())
    model = build(name).eval()
    with torch.no_grad():
        logits = model(torch.randn(INPUTS[name]))
    assert logits.shape[0] == INPUTS[name][0]
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", INPUTS)
def test_trains_every_parameter(name: str) -> None:
    torch.manual_seed(0)
    model = tiny(name)
    found = gradients(model, torch.randn(INPUTS[name]))
    assert len(found) == len(list(model.parameters()))
    assert all(gradient.isfinite().all() for gradient in found)


@pytest.mark.parametrize("name", INPUTS)
def test_norms_learn_statistics_in_training_only(name: str) -> None:
    torch.manual_seed(0)
    model = tiny(name)
    x = torch.randn(INPUTS[name]) + 5
    fresh = copy.deepcopy(model.state_dict())
    model.eval()
    model(x)
    assert all(torch.equal(value, fresh[key]) for key, value in model.state_dict().items())
    model.train()
    model(x)
    counts = {key: int(v) for key, v in model.state_dict().items() if key.endswith("num_batches_tracked")}
    assert counts
    assert set(counts.values()) == {1}


@pytest.mark.parametrize("name", INPUTS)
def test_same_seed_same_numbers(name: str) -> None:
    results = []
    for _ in range(2):
        torch.manual_seed(7)
        model = tiny(name, drop_rate=0.25)
        x = torch.randn(INPUTS[name])
        results.append([model(x).detach(), *gradients(model, x), *model.state_dict().values()])
    first, second = results
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", INPUTS)
def test_dropout_draws_in_training_only(name: str) -> None:
    torch.manual_seed(0)
    model = tiny(name, drop_rate=0.5)
    x = torch.randn(INPUTS[name])
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))
    state = torch.get_rng_state()
    tiny_without = tiny(name).train()
    torch.set_rng_state(state)
    tiny_without(x)
    assert torch.equal(torch.get_rng_state(), state), "a network without dropout draws random numbers"


@pytest.mark.parametrize("name", INPUTS)
def test_starts_as_documented(name: str) -> None:
    model = tiny(name)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert torch.equal(module.weight, torch.ones_like(module.weight))
            assert torch.equal(module.bias, torch.zeros_like(module.bias))
        elif isinstance(module, nn.Linear):
            assert torch.equal(module.bias, torch.zeros_like(module.bias))
        elif isinstance(module, nn.modules.conv._ConvNd):
            assert module.bias is None


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"growth_rate": 0}, "growth_rate"),
        ({"num_init_features": -1}, "num_init_features"),
        ({"num_classes": 0}, "num_classes"),
        ({"in_channels": 0}, "in_channels"),
        ({"block_config": ()}, "block_config"),
        ({"block_config": (2, 0)}, "block_config"),
        ({"drop_rate": 1.0}, "drop_rate is 1.0"),
        ({"drop_rate": -0.1}, "drop_rate is -0.1"),
    ],
    ids=str,
)
def test_refuses(name: str, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, **arguments)


@pytest.mark.parametrize("name", sorted(set(INPUTS) - {"plain"}))
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"compression": 0.0}, "compression is 0.0"),
        ({"compression": 1.5}, "compression is 1.5"),
        ({"bn_size": 0}, "bn_size"),
    ],
    ids=str,
)
def test_refuses_of_bottlenecks(name: str, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, **arguments)

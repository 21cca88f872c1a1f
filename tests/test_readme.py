"""The README's lines on training a model of one's own run as they are written."""

import importlib
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import memopt
from densenet_models import bc

README = Path(__file__).parents[1] / "README.md"
SECTION = re.compile(r"### Train your own model\n(.*?)\n## ", re.DOTALL)
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


@pytest.fixture
def import_library() -> Callable[[str], Any]:
    """Import a library that imports torchvision, also where that was built for another torch.

    From PyPI torchvision comes with operators for a torch with CUDA, which a CPU build cannot load. Nothing here uses
    them, but torchvision names two while it is imported.
    """

    def import_library(name: str) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for operator in ("nms", "qnms"):
                if not hasattr(torch.ops.torchvision, operator):
                    schema = "(Tensor boxes, Tensor scores, float threshold) -> Tensor"
                    torch.library.define(f"torchvision::{operator}", schema)
            return importlib.import_module(name)

    return import_library


class Small:
    """In place of `densenet_models.bc`: the same class, small by default."""

    @staticmethod
    def DenseNet() -> nn.Module:
        return bc.DenseNet(depth=10, growth_rate=2)


def block(start: str) -> str:
    section = SECTION.search(README.read_text(encoding="utf-8"))
    assert section is not None
    (found,) = [code for code in BLOCK.findall(section[1]) if code.startswith(start)]
    return str(found)


def names() -> dict[str, Any]:
    torch.manual_seed(0)
    batches = [(torch.randn(2, 3, 32, 32), torch.tensor([1, 4])) for _ in range(2)]
    return {
        "memopt": memopt,
        "torch": torch,
        "F": F,
        "bc": Small,
        "loader": DataLoader(batches, batch_size=None),  # type: ignore[arg-type]
        "device": torch.device("cpu"),
        "DistributedDataParallel": DistributedDataParallel,
        "fully_shard": fully_shard,
    }


def run(code: str, **libraries: Any) -> dict[str, Any]:
    space = names() | libraries
    exec(compile(code, str(README), "exec"), space)
    return space


def assert_all_rewritten(model: nn.Module) -> None:
    explanation = memopt.explain(model)
    assert explanation.ran, str(explanation)
    assert len(explanation.rewritten) == len(explanation.chains) > 0, str(explanation)


def test_plain_loop() -> None:
    space = run(block("model = memopt.apply(bc.DenseNet())"))
    assert_all_rewritten(space["model"])


def test_timm(import_library: Callable[[str], Any]) -> None:
    import_library("timm.optim")
    space = run(block("model = memopt.apply(timm"), timm=import_library("timm"))
    assert_all_rewritten(space["model"])


@pytest.mark.filterwarnings("ignore")  # Lightning's advice about workers, loggers and GPUs
def test_lightning(import_library: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = block("class Classifier").replace("Classifier(), loader", "classifier := Classifier(), loader")
    space = run(code, lightning=import_library("lightning"))
    assert_all_rewritten(space["classifier"].network)


@pytest.fixture
def _group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def compiled(model: nn.Module) -> nn.Module:
    """Without Inductor, which needs a C++ compiler and a minute."""
    return COMPILE(model, backend="eager")


COMPILE: Callable[..., nn.Module] = torch.compile


@pytest.mark.usefixtures("_group")
@pytest.mark.parametrize("left_out", [None, "torch.compile"])
def test_order_of_wrapping(monkeypatch: pytest.MonkeyPatch, left_out: str | None) -> None:
    code = block("model = memopt.apply(bc.DenseNet().to(device))")
    lines = [line for line in code.splitlines() if left_out is None or left_out not in line]
    assert len(lines) == (3 if left_out is None else 2)
    monkeypatch.setattr(torch, "compile", compiled)
    space = run("\n".join([lines[0], "inner = model", *lines[1:]]))
    space["model"](torch.randn(2, 3, 32, 32)).sum().backward()
    assert_all_rewritten(space["inner"])


@pytest.mark.usefixtures("_group")
def test_fully_shard_in_its_place() -> None:
    model = memopt.apply(Small.DenseNet())
    fully_shard(model)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert_all_rewritten(model)

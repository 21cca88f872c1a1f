"""What every test needs to know about the machine it runs on."""

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.composition.ranks import Ranks

# Without a GPU, Triton's kernels run in its interpreter, which is chosen when they are defined.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

ROOT = Path(__file__).parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        for item in items:  # they take the GPU where there is one
            if (ROOT / "tests" / "runtime") in item.path.parents:
                item.add_marker(pytest.mark.gpu)
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch sees none")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """One pair of processes for every test that needs several; they start when the first one does."""
    pair = Ranks()
    yield pair
    pair.stop()


def _load_command_from_the_tree() -> None:
    """Import the folder `cli` as `memopt_cli`, which is what installing would call it."""
    folder = ROOT / "cli"
    spec = importlib.util.spec_from_file_location(
        "memopt_cli", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if spec is None or spec.loader is None:
        raise ImportError(f"{folder} cannot be imported as memopt_cli. Install memopt: pip install -e .")
    module = importlib.util.module_from_spec(spec)
    sys.modules["memopt_cli"] = module
    spec.loader.exec_module(module)


def _make_hypothesis_deterministic() -> None:
    from hypothesis import settings

    settings.register_profile("ci", derandomize=True, deadline=None)
    settings.load_profile("ci")


if importlib.util.find_spec("memopt_cli") is None and (ROOT / "cli" / "__init__.py").exists():
    _load_command_from_the_tree()
if importlib.util.find_spec("hypothesis") is not None:
    _make_hypothesis_deterministic()

"""Every kernel compiles, without a GPU, for the GPUs it is meant for, and its tiles fit them.

What is compiled is what `launch` launches, with tensors of sizes that 16 divides unless said otherwise:

- sm_86, with the least shared memory: every choice of tiles among up to 1024 channels, output channels or partial
  results, in float32; of matmuls also without TF32, and in float16.
- sm_90, with other instructions for matmuls: every choice in bfloat16, and of matmuls in float32 with TF32; the tiles
  of many channels in float32 without.
- sm_80 and sm_89, for which Triton compiles as for sm_86: the tiles of many channels, in float32 and in bfloat16. For
  sm_80 also without the arguments that may be None, with every activation (where no matmul takes its time), and with
  sizes that nothing divides (in float16; matmuls in float32, too). The other ways to use a kernel for sm_86 and
  sm_90.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.kernels.cases import CASES
from tests.runtime.kernels.compile_kernels import MATMULS, SHARED

SPILLED = 640
"""Bytes of a thread that may wait in memory for want of registers: what is there now. A poor tile takes thousands."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Outside of Triton's interpreter, which this process may be in."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run(
        [sys.executable, "-m", "tests.runtime.kernels.compile_kernels"],
        cwd=Path(__file__).parents[3],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, f"nothing came of it. Its last words:\n{done.stderr[-6000:]}"
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def describe(result: dict[str, Any]) -> str:
    where = f"{result['kernel']} in {result['dtype']} for sm_{result['target']}, {result['shape']}, {result['tiles']}"
    if result["error"] is not None:
        return f"{where} does not compile: {result['error']}"
    return f"{where}: {result['shared']} B shared, {result['registers']} registers, {result['spilled']} B spilled"


def report(results: list[dict[str, Any]]) -> str:
    return "\n".join([f"{len(results)}, of which the first:", *map(describe, results[:12])])


@pytest.mark.parametrize("name", CASES)
def test_every_tile_compiles(name: str, results: list[dict[str, Any]]) -> None:
    of_kernel = [result for result in results if result["kernel"] == name]
    assert {result["target"] for result in of_kernel} == {80, 86, 89, 90}
    failed = [result for result in of_kernel if result["error"] is not None]
    assert not failed, report(failed)


@pytest.mark.parametrize("name", CASES)
def test_every_tile_fits_shared_memory(name: str, results: list[dict[str, Any]]) -> None:
    compiled = [result for result in results if result["kernel"] == name and result["error"] is None]
    too_large = [result for result in compiled if result["shared"] > SHARED[result["target"]]]
    assert not too_large, report(too_large)


@pytest.mark.parametrize("name", CASES)
def test_few_registers_spill(name: str, results: list[dict[str, Any]]) -> None:
    compiled = [result for result in results if result["kernel"] == name and result["error"] is None]
    untold = [result for result in compiled if result["spilled"] is None]
    assert not untold, f"ptxas says nothing of registers: {report(untold)}"
    spilling = [result for result in compiled if result["spilled"] > SPILLED]
    assert not spilling, report(spilling)


def test_every_type_and_precision_is_compiled(results: list[dict[str, Any]]) -> None:
    matmuls = set(MATMULS)
    partial = {"merge_moments"}
    types = {f"torch.{name}" for name in ("float32", "bfloat16", "float16")}
    for name in set(CASES) - partial:
        assert {result["dtype"] for result in results if result["kernel"] == name} == types
    for name in matmuls:
        single = [result for result in results if result["kernel"] == name and result["dtype"] == "torch.float32"]
        found = {(result["target"], result["tiles"]["PRECISION"]) for result in single}
        assert found >= {(target, precision) for target in (86, 90) for precision in ("tf32", "ieee")}

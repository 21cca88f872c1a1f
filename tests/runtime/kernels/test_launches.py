"""A launch is started again with new addresses in place of its tensors, and the same numbers."""

from typing import Any

import pytest

from memopt.runtime.kernels import launches
from memopt.runtime.kernels.launches import Kernel, Launched, observed, starter


class Compiled:
    """What Triton would have compiled: keeps what it is started with."""

    function, packed_metadata = "function", "metadata"

    def __init__(self) -> None:
        self.started: list[Any] = []

    def run(self, *arguments: Any) -> None:
        self.started.append(arguments)

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments, stream: self.run(*grid, stream, *arguments)


class Jit:
    arg_names = ("x", "y", "n", "SIZE")

    def __init__(self) -> None:
        self.compiled = Compiled()

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments, **constants: self.compiled


def test_a_launch_is_observed_with_its_arguments_in_order() -> None:
    kernel = Kernel(Jit())
    kernel[(1,)]("unseen", None, 0, SIZE=1, num_warps=4)
    with observed() as seen:
        kernel[(3, 2)]("x", None, 7, SIZE=16, num_warps=4)
    kernel[(1,)]("unseen", None, 0, SIZE=1, num_warps=4)
    assert [(one.grid, one.arguments) for one in seen] == [((3, 2, 1), ("x", None, 7, 16))]


@pytest.mark.parametrize("version", ["3.6.0", "99.0"])
@pytest.mark.parametrize("optional", [True, False])
def test_addresses_are_filled_in(version: str, optional: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches.triton, "__version__", version, raising=False)
    compiled = Compiled()
    arguments = [(0, 64), (-1, None), (2, 0), (-1, 5)] if optional else [(0, 64), (2, 0), (-1, 5)]
    start = starter(Launched(compiled, (4, 1, 1), ()), arguments)
    start(9, [1000, 2000, 3000])
    (seen,) = compiled.started
    assert seen[:4] == (4, 1, 1, 9)
    expected = (1064, None, 3000, 5) if optional else (1064, 3000, 5)
    assert seen[-len(expected) :] == expected

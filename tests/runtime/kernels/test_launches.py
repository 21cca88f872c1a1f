"""A launch is started again with new addresses in place of its tensors, and the same numbers."""

import ctypes
import threading
import weakref
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from memopt.runtime.kernels import launches
from memopt.runtime.kernels.launches import (
    Address,
    Kernel,
    Launched,
    Relaunch,
    compile_ahead,
    compile_soon,
    observed,
    pack,
)
from memopt.runtime.tape.burst import Burst

SIGNATURE = {"x": "*fp32", "absent": "constexpr", "n": "i32", "eps": "fp32", "y": "*fp32", "SIZE": "constexpr"}
ARGUMENTS = [Address(0, 64), None, -7, 0.5, Address(2, 0), 16]


class Compiled:
    """What Triton would have compiled: keeps what it is started with."""

    function = 77

    def __init__(self, **metadata: Any) -> None:
        self.started: list[Any] = []
        self.src = SimpleNamespace(signature=SIGNATURE)
        self.metadata = SimpleNamespace(**{"num_ctas": 1, "num_warps": 4, "shared": 1024, **metadata})

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments, stream: self.started.append((grid, stream, arguments))


class Jit:
    arg_names = tuple(SIGNATURE)

    def __init__(self) -> None:
        self.compiled = Compiled()

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments, **constants: self.compiled


class Driver:
    """Reads the parameters of each launch, as a GPU would, when it is launched."""

    def __init__(self, sizes: list[int] | None, code: int = 0) -> None:
        self.sizes, self.code = sizes, code
        self.launches: list[Any] = []

    def parameter_sizes(self, function: int) -> list[int] | None:
        return self.sizes

    def launch(self, *arguments: Any) -> int:
        function, *sizes, stream, parameters, extra = arguments
        assert all(type(size) is int for size in sizes)
        assert extra is None
        places = ctypes.cast(parameters, ctypes.POINTER(ctypes.c_void_p))
        kinds = (ctypes.c_uint64, ctypes.c_int32, ctypes.c_float, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint64)
        values = [kind.from_address(places[n]).value for n, kind in enumerate(kinds)]  # type: ignore[arg-type]
        self.launches.append(([function.value, *sizes], stream.value, values))
        return self.code

    def enter(self, device: int) -> None: ...

    def describe(self, code: int) -> str:
        return f"error {code}"


SIZES = [8, 4, 4, 8, 8, 8]


def relaunch(**metadata: Any) -> Relaunch:
    return Relaunch(Launched(Compiled(**metadata), (4, 2, 1), ()), ARGUMENTS)


def test_a_launch_is_observed_with_its_arguments_in_order() -> None:
    kernel = Kernel(Jit())
    kernel[(1,)]("unseen", None, 0, eps=0.0, y="", SIZE=1, num_warps=4)
    with observed() as seen:
        kernel[(3, 2)]("x", None, 7, eps=0.5, y="y", SIZE=16, num_warps=4)
    kernel[(1,)]("unseen", None, 0, eps=0.0, y="", SIZE=1, num_warps=4)
    assert [(one.grid, one.arguments) for one in seen] == [((3, 2, 1), ("x", None, 7, 0.5, "y", 16))]


def test_compiling_ahead_launches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mode:
        def __init__(self, pool: Any, *, ignore_errors: bool) -> None: ...

        def __enter__(self) -> None:
            events.append("begin")

        def __exit__(self, *error: object) -> None:
            events.append("end")

    class Compiling(Jit):
        def warmup(self, *arguments: Any, grid: Any, **constants: Any) -> Any:
            events.append((arguments, grid, constants))
            if arguments[1] == 0:
                return SimpleNamespace(future=None, kernel=None)  # it did not compile
            if arguments[1] == 1:
                return SimpleNamespace(kernel=b"of an earlier call")
            source = SimpleNamespace(signature={"x": "*fp32", "n": "i32", "SIZE": "constexpr"})
            return SimpleNamespace(future=None, kernel=SimpleNamespace(src=source, metadata="metadata"))

        def __getitem__(self, grid: Any) -> Any:
            return lambda *arguments, **constants: events.append("launched")

    def launcher(source: Any, metadata: str) -> None:
        events.append(("launcher", *source.signature.values(), metadata))
        raise RuntimeError("left for the launch to say")

    events: list[Any] = []
    driver = SimpleNamespace(active=SimpleNamespace(launcher_cls=launcher))
    namespace = SimpleNamespace(AsyncCompileMode=Mode, runtime=SimpleNamespace(driver=driver))
    monkeypatch.setattr(launches, "triton", namespace)
    kernel = Kernel(Compiling())
    numbers = (0, 1, 2, 3, 5)  # the last three are one variant
    compile_ahead([lambda number=number: kernel[(5,)]("x", number, SIZE=16) for number in numbers])
    kernel[(5,)]("x", 2, SIZE=16)
    compiled = [(("x", number), (5,), {"SIZE": 16}) for number in (0, 1, 2)]
    assert events == ["begin", *compiled, "end", ("launcher", "*fp32", "i32", "constexpr", "metadata"), "launched"]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ((32, 0.5), (48, 0.5), True),
        ((12, 0.5), (20, 0.5), True),
        ((12, 0.5), (16, 0.5), False),
        ((1, 0.5), (3, 0.5), False),
        ((3, 0.5), (2**31 + 1, 0.5), False),
        ((2**31 + 1, 0.5), (2**63 + 1, 0.5), False),
        ((3, True), (3, False), False),
        ((3, None), (3, 0.5), False),
        ((3, torch.empty(4)), (3, torch.ones(8)), True),
        ((3, torch.empty(4)), (3, torch.empty(4, dtype=torch.float64)), False),
        ((3, torch.empty(8)[4:]), (3, torch.empty(8)[1:]), False),
    ],
)
def test_every_variant_is_compiled_once(
    monkeypatch: pytest.MonkeyPatch, one: tuple[Any, ...], other: tuple[Any, ...], same: bool
) -> None:
    class Compiling(Jit):
        def warmup(self, *arguments: Any, grid: Any, **constants: Any) -> Any:
            compiled.append(arguments)
            return SimpleNamespace(kernel=None)

    compiled: list[Any] = []
    monkeypatch.setattr(launches, "triton", SimpleNamespace(AsyncCompileMode=lambda *a, **k: nullcontext()))
    first, second = Kernel(Compiling()), Kernel(Compiling())
    compile_ahead([lambda kernel=k, a=a: kernel[(5,)](*a, SIZE=16) for k in (first, second) for a in (one, other)])
    assert len(compiled) == (2 if same else 4)
    compile_ahead([lambda size=size: first[(5,)](*one, SIZE=size) for size in (16, 32)])
    assert len(compiled) == (4 if same else 6)


def test_compiled_in_the_background_on_the_tensors_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def on(device: torch.device) -> Any:
        events.append((device, threading.get_ident()))
        return nullcontext()

    events: list[Any] = []
    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(launches, "compile_ahead", lambda all: [launch() for launch in all])
    where = torch.device("cuda", 1)
    compile_soon([lambda: events.append(threading.get_ident())], where).result()
    (device, entered), compiled = events
    assert device == where
    assert entered == compiled != threading.get_ident()


def test_triton_is_handed_addresses() -> None:
    launch = relaunch()
    launch.start(9, [1000, 2000, 3000])
    assert launch.compiled.started == [((4, 2, 1), 9, (1064, None, -7, 0.5, 3000, 16))]


def test_the_driver_is_handed_addresses_and_values() -> None:
    driver = Driver(SIZES)
    packed = pack(relaunch(), SIZES)
    assert packed is not None
    burst = Burst([packed, packed], driver)
    for stream, addresses in ((5, [1000, 0, 3000]), (6, [2**40, 0, 8])):
        driver.launches.clear()
        burst.run(stream, torch.tensor(addresses))
        expected = [addresses[0] + 64, -7, 0.5, addresses[2], 0, 0]
        assert driver.launches == [([77, 4, 2, 1, 128, 1, 1, 1024], stream, expected)] * 2


@pytest.mark.parametrize(
    ("metadata", "sizes"),
    [
        ({"num_ctas": 2}, SIZES),
        ({"launch_pdl": True}, SIZES),
        ({"profile_scratch_size": 8}, SIZES),
        ({}, None),
        ({}, [8, 8, 4, 8, 8, 8]),
        ({}, [8, 4, 4]),
        ({}, [*SIZES, 4]),
    ],
    ids=str,
)
def test_what_is_not_as_expected_is_left_to_triton(metadata: dict[str, Any], sizes: list[int] | None) -> None:
    assert pack(relaunch(**metadata), sizes) is None


def test_parameters_lie_where_the_driver_reads_them_whatever_the_default_device() -> None:
    driver = Driver(SIZES)
    packed = pack(relaunch(), SIZES)
    assert packed is not None
    with torch.device("meta"):
        burst = Burst([packed], driver)
    burst.run(5, torch.tensor([1000, 0, 3000]))
    assert driver.launches[0][2] == [1064, -7, 0.5, 3000, 0, 0]


def test_a_refused_launch_is_an_error() -> None:
    driver = Driver(SIZES, code=700)
    packed = pack(relaunch(), SIZES)
    assert packed is not None
    with pytest.raises(RuntimeError, match="error 700"):
        Burst([packed], driver).run(0, torch.tensor([0, 0, 0]))


def test_a_relaunch_keeps_no_tensor_alive() -> None:
    tensor = torch.zeros(1)
    gone = weakref.ref(tensor)
    launch = Relaunch(Launched(Compiled(), (1, 1, 1), (tensor, None, -7, 0.5, tensor, 16)), ARGUMENTS)
    del tensor
    assert gone() is None
    launch.start(0, [0, 0, 0])

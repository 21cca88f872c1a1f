"""Every kernel computes what its plain-torch reference does: interpreted on a CPU, compiled on a GPU."""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from memopt.runtime import kernels
from memopt.runtime.kernels import tiles
from memopt.runtime.kernels.launches import Kernel, Outline
from memopt.runtime.kernels.library import LAUNCHES
from memopt.runtime.kernels.norm_act_conv_backward import part_count as conv_part_count
from memopt.runtime.kernels.norm_act_conv_weight import parts_size
from memopt.runtime.kernels.norm_act_sums import part_count as sums_part_count
from memopt.runtime.kernels.pack_taps import packed_size
from memopt.runtime.kernels.reference import as_operand
from memopt.runtime.kernels.tiles import readable
from tests.runtime.kernels.cases import (
    ACTIVATIONS,
    CASES,
    OPTIONAL,
    SHAPES,
    WITH_ACTIVATION,
    Maker,
    Shape,
    finish_norm,
    image_size,
    norm_act_conv_backward,
    norm_act_sums,
)

for name in CASES:
    importlib.import_module(f"memopt.runtime.kernels.{name}")

# Triton's interpreter makes scalars of one-element arrays, and numpy speaks where a GPU does not.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
RELU = ACTIVATIONS["relu"]


@pytest.fixture(autouse=True)
def _references_in_single_precision() -> Iterator[None]:
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def launcher(name: str) -> Callable[..., None]:
    launch: Callable[..., None] = importlib.import_module(f"memopt.runtime.kernels.{name}").launch
    return launch


def reference(name: str) -> Callable[..., None]:
    compute: Callable[..., None] = importlib.import_module(f"memopt.runtime.kernels.{name}").compute
    return compute


def make(
    name: str,
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    activation: tuple[int, float] = RELU,
    centre: float = 0.0,
    device: str = DEVICE,
    allow_tf32: bool = False,
) -> dict[str, Any]:
    return CASES[name](Maker(shape, dtype, device, centre, allow_tf32), activation)


def assert_close(actual: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            want, got = value.double(), actual[key].double()
            assert not want.isnan().any(), f"{key} was not written by the reference"
            assert not got.isnan().any(), f"{key} was not written everywhere"
            assert (got - want).norm() <= tolerance * want.norm().clamp(min=1e-3), key


def check(name: str, tolerance: float, without: str | None = None, **options: Any) -> None:
    actual, expected = make(name, **options), make(name, **options)
    if without is not None:
        actual[without] = expected[without] = None
    launcher(name)(*actual.values())
    reference(name)(*expected.values())
    assert_close(actual, expected, tolerance)


def test_every_operator_has_a_case() -> None:
    files = {path.stem for path in Path(kernels.__path__[0]).glob("*.py") if "define(" in path.read_text()}
    assert set(CASES) == set(LAUNCHES) == files - {"library"}


@pytest.mark.parametrize("allow_tf32", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_an_outline_starts_what_its_tensor_does(
    name: str, shape: Shape, allow_tf32: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def outlined(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return Outline(value.dtype, value.shape, value.stride(), value.storage_offset() * value.element_size())

    def started(arguments: list[Any]) -> Any:
        seen: list[Any] = []

        def at(kernel: Kernel, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(*given: Any, **constants: Any) -> None:
                tensors = [a.tensor() if isinstance(a, Outline) else a for a in given]
                seen.append((kernel, grid, [_as_launched(a) for a in tensors], constants))

            return launch

        monkeypatch.setattr(Kernel, "__getitem__", at)
        launcher(name)(*arguments)
        return seen

    values = list(make(name, shape, allow_tf32=allow_tf32).values())
    assert started([outlined(value) for value in values]) == started(values) != []


def _as_launched(argument: Any) -> Any:
    if not isinstance(argument, torch.Tensor):
        return argument
    return argument.dtype, argument.shape, argument.stride(), argument.storage_offset()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_kernel_equals_reference(name: str, shape: Shape, dtype: torch.dtype) -> None:
    check(name, TOLERANCES[dtype], shape=shape, dtype=dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", WITH_ACTIVATION)
def test_activations(name: str, activation: str) -> None:
    check(name, 1e-5, shape=Shape(40, 9, 20, 16), activation=ACTIVATIONS[activation])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", [name for name in CASES if "allow_tf32" in make(name, SHAPES[0])])
def test_tf32_rounds_to_nearest(name: str, shape: Shape) -> None:
    """The hardware cuts, which a norm's mean sees: all products would be too small."""
    actual, expected = (make(name, shape, allow_tf32=True) for _ in range(2))
    launcher(name)(*actual.values())
    reference(name)(*expected.values())
    # A value just beside the middle between two of TF32 may round to the other.
    assert_close(actual, expected, 1e-4)


@pytest.mark.parametrize(("name", "written"), [("norm_act_backward", "dx"), ("feature_gradient", "out")])
def test_operands_are_rounded_where_they_are_made(name: str, written: str) -> None:
    actual, expected = make(name, SHAPES[3]), make(name, SHAPES[3])
    for arguments in (actual, expected):
        arguments["round_to_tf32"] = True
    launcher(name)(*actual.values())
    reference(name)(*expected.values())
    assert_close(actual, expected, 1e-4)
    assert not (actual[written].view(torch.int32) & 8191).any()


@pytest.mark.parametrize("name", ["norm_act_matmul_backward", "norm_act_conv_backward"])
def test_a_rounded_gradient_is_not_rounded_again(name: str) -> None:
    first, second = make(name, SHAPES[3]), make(name, SHAPES[3])
    given = next(iter(first))
    for arguments, rounded in ((first, False), (second, True)):
        arguments["allow_tf32"], arguments["rounded"] = True, rounded
        arguments[given] = as_operand(arguments[given], True)
        launcher(name)(*arguments.values())
    assert_close(first, second, 0)


@pytest.mark.parametrize("name", CASES)
def test_optional_arguments(name: str) -> None:
    shape = Shape(40, 9, 20, 16)
    given = [key for key in make(name, shape) if key in OPTIONAL]
    written = {"merge_moments": ["moments"], "moments": ["moments"], "norm_act_matmul_backward": ["gradient"]}
    needed = written.get(name, []) + (["constant", "slope", "gradient"] if name.endswith("_gradient") else [])
    needed += ["constant", "slope"] if name == "norm_act_backward" else []
    for key in given:
        if key in needed:
            continue
        if key == "slope":  # goes with `constant`
            continue
        actual, expected = make(name, shape), make(name, shape)
        for arguments in (actual, expected):
            arguments[key] = None
            if key == "constant":
                arguments["slope"] = None
        launcher(name)(*actual.values())
        reference(name)(*expected.values())
        assert_close(actual, expected, 1e-5)


@pytest.mark.parametrize("name", [name for name in CASES if "x" in make(name, SHAPES[0])])
def test_what_lies_around_an_interval_is_neither_used_nor_changed(name: str) -> None:
    """Kernels may read a few channels more than they are given, and write them back."""
    arguments = make(name, Shape(130, 44, 64, 48))
    x, gradient = arguments["x"], arguments.get("gradient")
    assert readable(x) == 48
    launcher(name)(*arguments.values())
    for value in arguments.values():
        assert not isinstance(value, torch.Tensor) or not value.isnan().any()
    assert x._base.isnan().sum() == 130 * (64 - 44)
    if gradient is not None:
        assert (gradient._base == 7.0).sum() == 130 * (64 - 44)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_convolution_backward_into_an_arena(shape: Shape) -> None:
    maker = [Maker(shape, torch.float32, DEVICE, 0.0) for _ in range(2)]
    actual, expected = (norm_act_conv_backward(each, RELU, accumulate=True) for each in maker)
    launcher("norm_act_conv_backward")(*actual.values())
    reference("norm_act_conv_backward")(*expected.values())
    assert_close(actual, expected, 1e-5)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("taps", [False, True], ids=["matrix", "taps"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weight_gradients(shape: Shape, taps: bool, dtype: torch.dtype, channels_last: bool) -> None:
    actual, expected = (finish_norm(Maker(shape, dtype, DEVICE), RELU, taps=taps) for _ in range(2))
    for arguments in (actual, expected):
        arguments["accumulate"] = False
        arguments["constant"].fill_(float("nan"))
        arguments["slope"].fill_(float("nan"))
        if channels_last and arguments["gradient"].dim() == 4:
            arguments["gradient"] = arguments["gradient"].contiguous(memory_format=torch.channels_last)
    launcher("finish_norm")(*actual.values())
    reference("finish_norm")(*expected.values())
    assert_close(actual, expected, TOLERANCES[dtype])


@pytest.mark.parametrize("shape", SHAPES[2:5], ids=str)
@pytest.mark.parametrize(
    ("name", "chooser"),
    [("norm_act_matmul_backward", "matmul_backward"), ("norm_act_conv_backward", "conv_backward")],
)
def test_sums_may_wait_for_the_last_tile(
    name: str, chooser: str, shape: Shape, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose = getattr(tiles, chooser)
    monkeypatch.setattr(tiles, chooser, lambda *sizes: replace(choose(*sizes), sums_by_row=True, programs=1))
    check(name, 1e-5, shape=shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_of_averages(shape: Shape, dtype: torch.dtype) -> None:
    maker = [Maker(shape, dtype, DEVICE, 0.0) for _ in range(2)]
    actual, expected = (norm_act_sums(each, RELU, pooled=True) for each in maker)
    launcher("norm_act_sums")(*actual.values())
    reference("norm_act_sums")(*expected.values())
    assert_close(actual, expected, TOLERANCES[dtype])


@pytest.mark.parametrize("window", [(2, 2), (1, 5), (2, 3)], ids=str)
def test_averages_are_torch_s(window: tuple[int, int]) -> None:
    """With mean 0, variance 1: torch's own pooling, and its gradient."""
    maker = Maker(Shape(1, 20, 32, 1), torch.float32, "cpu", 0.0)
    image = maker.normal(3, 20, 4, 30).requires_grad_()
    wanted = F.avg_pool2d(image.relu(), window)
    grad = torch.randn_like(wanted)
    wanted.backward(grad)

    def rows(t: torch.Tensor) -> torch.Tensor:
        return t.detach().movedim(1, 3).reshape(-1, 20).to(DEVICE)

    zeros, ones = torch.zeros(20, device=DEVICE), torch.ones(20, device=DEVICE)
    norm = (zeros, ones, ones, zeros, 0.0, *RELU)
    z, gradient = torch.empty_like(rows(wanted)), torch.zeros(360, 20, device=DEVICE)
    sums = torch.empty(2, 20, sums_part_count(360, 20), device=DEVICE)
    launcher("norm_act_pool")(rows(image), *norm, 30, list(window), z)
    launcher("norm_act_sums")(rows(grad), rows(image), *norm, 30, list(window), sums, gradient)

    torch.testing.assert_close(z, rows(wanted))
    torch.testing.assert_close(gradient, rows(image.grad))
    torch.testing.assert_close(sums[0].sum(1), rows(image.grad).sum(0))


def test_a_convolution_is_torch_s() -> None:
    """The references are judged, too: with mean 0, variance 1 and no activation, by torch's own gradients."""
    maker = Maker(Shape(130, 44, 64, 12), torch.float32, "cpu", 0.0)
    height, width = image_size(130)
    image = maker.normal(2, 44, height, width).requires_grad_()
    weight, bias = maker.normal(12, 44, 3, 3).requires_grad_(), maker.normal(12)
    wanted = F.conv2d(image, weight, bias, padding=1)
    grad = torch.randn_like(wanted)
    wanted.backward(grad)
    x, g = (t.detach().movedim(1, 3).reshape(130, -1).to(DEVICE) for t in (image, grad))
    zeros, ones = torch.zeros(44, device=DEVICE), torch.ones(44, device=DEVICE)
    taps = torch.empty(packed_size(weight), device=DEVICE)
    launcher("pack_taps")(weight.detach().to(DEVICE), False, taps)
    y, d = torch.empty(130, 12, device=DEVICE), torch.empty(130, 44, device=DEVICE)
    norm = (zeros, ones, ones, zeros, 0.0, *ACTIVATIONS["identity"])
    launcher("norm_act_conv")(x, *norm, taps, bias.to(DEVICE), height, width, False, y, None)
    count = conv_part_count(130, 44, 4)
    parts, sums = torch.empty(count, 3, 64, 44, device=DEVICE), torch.empty(2, 44, count, device=DEVICE)
    launcher("norm_act_conv_backward")(g, x, *norm, taps, height, width, False, False, False, d, parts, sums)
    gradient = torch.empty(weight.shape, device=DEVICE)
    unused = [torch.empty(44, device=DEVICE) for _ in range(2)]
    launcher("finish_norm")(sums, ones, ones, 0.0, 130, False, *unused, None, None, parts, gradient)

    apart, alone = torch.empty(parts_size(130, 44, weight), device=DEVICE), torch.empty(weight.shape, device=DEVICE)
    launcher("norm_act_conv_weight")(g, x, *norm, height, width, False, apart)
    launcher("finish_norm")(sums, ones, ones, 0.0, 130, False, *unused, None, None, apart, alone)

    def rows(t: torch.Tensor) -> torch.Tensor:
        return t.detach().movedim(1, 3).reshape(130, -1).cpu()

    torch.testing.assert_close(y.cpu(), rows(wanted), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(d.cpu(), rows(image.grad), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient.cpu(), weight.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(alone.cpu(), weight.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["moments", "merge_moments"])
def test_moments_of_inputs_far_from_zero(name: str) -> None:
    """Against float64: mean 100 times the deviation."""
    arguments = make(name, Shape(1000, 5, 8, 1), centre=100.0)
    launcher(name)(*arguments.values())
    if name == "merge_moments":
        exact = make(name, Shape(1000, 5, 8, 1), centre=100.0)
        reference(name)(*exact.values())
        torch.testing.assert_close(arguments["variance"], exact["variance"], rtol=1e-6, atol=0)
        return
    averages, squares = arguments["moments"].double().unbind()
    rows = arguments["x"].double().split(importlib.import_module("memopt.runtime.kernels.moments").part_rows(1000, 5))
    for index, part in enumerate(rows):
        torch.testing.assert_close(averages[:, index], part.mean(0), rtol=1e-6, atol=0)
        torch.testing.assert_close(squares[:, index], (part - part.mean(0)).square().sum(0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["norm_act", "norm_act_pool", "norm_act_matmul", "norm_act_conv"])
def test_nan_and_infinity_stay(name: str) -> None:
    arguments = make(name, Shape(20, 4, 4, 4))
    x = arguments["x"]
    x[3, 1], x[5, 2], x[7, 0] = float("nan"), float("inf"), float("-inf")
    launcher(name)(*arguments.values())
    result = arguments.get("z", arguments.get("y"))
    expected = make(name, Shape(20, 4, 4, 4))
    expected["x"][:] = x
    reference(name)(*expected.values())
    want = expected.get("z", expected.get("y"))
    assert torch.equal(result.isnan(), want.isnan())
    assert torch.equal(result.isinf(), want.isinf())
    assert result[3 * len(result) // len(x)].isnan().any()


@pytest.mark.parametrize("name", CASES)
def test_same_bits_every_time(name: str) -> None:
    shape = Shape(300, 70, 100, 20)
    first, second = make(name, shape), make(name, shape)
    launcher(name)(*first.values())
    launcher(name)(*second.values())
    for key, value in first.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, second[key]), key


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name: str) -> None:
    operator = getattr(torch.ops.memopt, name).default
    arguments = make(name, Shape(37, 12, 30, 13))
    torch.library.opcheck(operator, tuple(arguments.values()))

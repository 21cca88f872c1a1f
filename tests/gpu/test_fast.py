"""On a GPU: fused kernels keep the bound at full size, stay small, repeat themselves and never wait for the device."""

import copy
import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import memopt
from densenet_models import bc
from memopt.measure.bound import measure_distance
from memopt.measure.memory import leave, measure_step
from memopt.measure.predict import predict_step
from memopt.runtime.fused.forward import Forward

pytestmark = pytest.mark.gpu

INPUTS = (torch.zeros(64, 3, 32, 32).normal_(generator=torch.Generator().manual_seed(0)),)


def fast(model: nn.Module, level: str = "layer") -> nn.Module:
    return memopt.apply(model, config=memopt.Config(numerics="fast", recompute=level))


@pytest.mark.parametrize("allow_tf32", [True, False], ids=["tf32", "ieee"])
@pytest.mark.parametrize("amp", [None, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_bc_100_is_within_the_bound(amp: torch.dtype | None, allow_tf32: bool, channels_last: bool) -> None:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    torch.manual_seed(0)
    naive = bc.DenseNet().cuda().to(memory_format=memory_format)
    x = torch.randn(32, 3, 32, 32, device="cuda").contiguous(memory_format=memory_format)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=allow_tf32):
        distance = measure_distance(naive, fast(copy.deepcopy(naive)), (x,), amp=amp)

    assert distance.within_bound, distance


@pytest.mark.parametrize(("level", "ratio"), [("layer", 0.10), ("concat", 0.22)])
def test_activation_peak(level: str, ratio: float) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    naive = measure_step(bc.DenseNet, INPUTS, device, steps=1)
    after = measure_step(lambda: fast(bc.DenseNet(), level), INPUTS, device, remove=memopt.remove, steps=1)
    predicted = predict_step(bc.DenseNet, INPUTS, apply=lambda model: fast(model, level), remove=leave)

    assert naive.activation_peak_bytes
    assert after.activation_peak_bytes
    assert after.activation_peak_bytes <= ratio * naive.activation_peak_bytes
    assert predicted.activation_peak_bytes == pytest.approx(after.activation_peak_bytes, rel=0.05)
    assert after.peak_reserved_bytes
    assert after.peak_allocated_bytes
    assert after.peak_reserved_bytes <= 1.3 * after.peak_allocated_bytes


def trained(step: Callable[[], None], model: nn.Module) -> list[torch.Tensor]:
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    return [t.detach().clone() for t in (*model.parameters(), *model.buffers())]


def make_step(depth: int = 22) -> tuple[Callable[[], None], nn.Module]:
    torch.manual_seed(0)
    model = fast(bc.DenseNet(depth=depth).cuda())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x = torch.randn(8, 3, 32, 32, device="cuda", generator=torch.Generator("cuda").manual_seed(1))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(x).square().mean().backward()
        optimizer.step()

    return step, model


def test_same_bits_from_run_to_run() -> None:
    with torch.backends.cudnn.flags(enabled=True, deterministic=True):  # the stem and the pooling are not memopt's
        first, second = (trained(*make_step()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@contextmanager
def _waiting_is_an_error() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype", UserWarning)
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_nothing_stays_allocated_between_steps() -> None:
    """Compared with the untouched model, once libraries have taken their workspaces: parameters and momentum."""
    left = []
    for apply in (lambda model: model, fast, lambda model: model, fast):
        gc.collect()
        torch.manual_seed(0)
        before = torch.cuda.memory_allocated()
        model = apply(bc.DenseNet(depth=40).cuda())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(4):
            model(INPUTS[0].cuda()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        left.append(torch.cuda.memory_allocated() - before)
        del model, optimizer
    assert left[3] == left[2]


def test_a_step_never_waits_for_the_device() -> None:
    step, _ = make_step()
    step()
    with _waiting_is_an_error():
        step()


@pytest.fixture
def _deterministic_rest() -> Iterator[None]:
    """The stem and the pooling are not memopt's."""
    with torch.backends.cudnn.flags(enabled=True, deterministic=True):
        yield


@pytest.mark.usefixtures("_deterministic_rest")
def test_a_step_is_captured_into_a_cuda_graph() -> None:
    eager_step, eager_model = make_step()
    for _ in range(3):
        eager_step()
    expected = trained(eager_step, eager_model)
    step, model = make_step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    actual = trained(graph.replay, model)
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))
    del graph
    gc.collect()


def test_an_arena_of_more_than_two_to_the_31_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offsets of 32 bits would wrap. Compared with the same images in two halves, with running statistics."""
    sizes: list[int] = []
    run = Forward.run
    monkeypatch.setattr(Forward, "run", lambda self: sizes.append(self.arena.numel()) or run(self))
    settings = {"block_config": (3,), "growth_rate": 16, "bn_size": 1, "num_init_features": 512}
    model = fast(bc.DenseNet(**settings, small_inputs=True).cuda().eval())
    x = torch.randn(60, 3, 256, 256, device="cuda")

    def gradients(images: torch.Tensor) -> list[torch.Tensor]:
        model.zero_grad(set_to_none=True)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(images).float().square().sum()
        loss.backward()
        return [p.grad.double() for p in model.parameters()]

    whole = gradients(x)
    halves = [a + b for a, b in zip(gradients(x[:30]), gradients(x[30:]), strict=True)]

    assert max(sizes) > 2**31
    for one, two in zip(whole, halves, strict=True):
        assert (one - two).norm() <= 0.02 * one.norm() + 1e-6

"""On a GPU: the memory that the caching allocator gives out, and what is left of it when things go wrong."""

import gc
from functools import partial

import pytest
import torch
from torch import nn

import memopt
from densenet_models import bc
from memopt.measure.memory import StepFigures, measure_step
from memopt.measure.predict import predict_step
from memopt.verify import RECOMPUTED

pytestmark = pytest.mark.gpu

INPUTS = (torch.zeros(64, 3, 32, 32).normal_(generator=torch.Generator().manual_seed(0)),)


def _applied(level: str) -> nn.Module:
    return memopt.apply(bc.DenseNet(), config=memopt.Config(numerics="exact", recompute=level))


@pytest.fixture(scope="module")
def naive() -> StepFigures:
    return measure_step(bc.DenseNet, INPUTS, torch.device("cuda"), steps=1)


@pytest.mark.parametrize(("level", "ratio"), [("concat", 0.37), ("layer", 0.15)])
def test_activation_peak_and_reserved(naive: StepFigures, level: str, ratio: float) -> None:
    after = measure_step(partial(_applied, level), INPUTS, torch.device("cuda"), remove=memopt.remove, steps=1)

    assert naive.activation_peak_bytes
    assert after.activation_peak_bytes
    assert after.activation_peak_bytes <= ratio * naive.activation_peak_bytes
    assert after.peak_reserved_bytes
    assert after.peak_allocated_bytes
    assert after.peak_reserved_bytes <= 1.3 * after.peak_allocated_bytes
    assert after.retained_bytes == 0


@pytest.mark.parametrize("level", [None, "concat", "layer"])
def test_prediction_agrees_with_measurement(level: str | None) -> None:
    make = bc.DenseNet if level is None else partial(_applied, level)
    measured = measure_step(make, INPUTS, torch.device("cuda"), steps=1).activation_peak_bytes
    config = memopt.Config(numerics="exact", recompute=level or "auto")
    apply = (lambda m: m) if level is None else (lambda m: memopt.apply(m, config=config))
    predicted = predict_step(bc.DenseNet, INPUTS, apply=apply).activation_peak_bytes

    assert measured
    assert predicted
    assert abs(predicted - measured) < 0.05 * measured


@pytest.mark.parametrize("numerics", ["exact", "fast"])
@pytest.mark.parametrize("budget", ["400MiB", "700MiB", "1500MiB"])
def test_no_step_exceeds_its_memory_budget(numerics: str, budget: str) -> None:
    config = memopt.Config(numerics=numerics, memory_budget=budget)
    after = measure_step(lambda: memopt.apply(bc.DenseNet(), config=config), INPUTS, torch.device("cuda"), steps=1)

    assert after.peak_allocated_bytes
    assert after.peak_allocated_bytes <= config.budget_bytes


@pytest.mark.parametrize("numerics", ["exact", "fast"])
def test_out_of_memory_in_the_middle_leaves_nothing_behind(numerics: str) -> None:
    model = memopt.apply(bc.DenseNet(depth=40).cuda(), config=memopt.Config(numerics=numerics))
    small, large = torch.randn(4, 3, 32, 32, device="cuda"), torch.randn(1024, 3, 32, 32, device="cuda")

    def step(x: torch.Tensor) -> None:
        model(x).mean().backward()
        model.zero_grad()

    step(small)
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 600 * 2**20) / total)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            step(large)
        model.zero_grad()  # backward may have come some way
        assert torch.cuda.memory_allocated() == before
        step(small)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_step_is_captured_into_a_cuda_graph() -> None:
    def trained(captured: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = memopt.apply(bc.DenseNet(depth=22).cuda(), config=memopt.Config(numerics="exact"))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        x = torch.randn(8, 3, 32, 32, device="cuda", generator=torch.Generator("cuda").manual_seed(1))

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            model(x).square().mean().backward()
            optimizer.step()

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        if captured:
            graph = torch.cuda.CUDAGraph()
            optimizer.zero_grad(set_to_none=True)
            with torch.cuda.graph(graph):
                step()
            for _ in range(3):
                graph.replay()
        else:
            for _ in range(3):
                step()
        torch.cuda.synchronize()
        return [p.detach().clone() for p in model.parameters()] + [b.clone() for b in model.buffers()]

    with torch.backends.cudnn.flags(enabled=True, deterministic=True):
        pairs = zip(trained(captured=False), trained(captured=True), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("numerics", ["exact", "fast"])
def test_verification_fits_where_a_naive_step_does_not(numerics: str) -> None:
    model = bc.DenseNet(depth=250).cuda()
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    # Of two images the untouched model keeps 1,314 MiB; recomputing, a step takes 186 MiB, in float64 372 MiB.
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 1150 * 2**20) / total)
    try:
        memopt.apply(model, torch.randn(8, 3, 64, 64, device="cuda"), config=memopt.Config(numerics=numerics))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)

    assert RECOMPUTED in memopt.explain(model).notes
    assert {chain.numerics for chain in memopt.explain(model).chains} == {numerics}

"""Which forward runs: with gradients, under other tools, on replicas, after the module has changed."""

import copy
import sys
import threading
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, parametrize
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import memopt
from memopt.measure.tracker import StorageTracker
from tests.helpers import (
    DenseBlock,
    DenseNet,
    assert_exact,
    assert_rewritten,
    assert_same,
    assert_trains_alike,
    dense_net,
    images,
    plain,
    rewritten_copy,
    state_of,
    train_step,
    unsettle,
)


def test_without_gradients_the_models_own_forward_runs() -> None:
    naive, model = dense_net(), rewritten_copy(dense_net())

    for each in (naive, model):
        with torch.no_grad():
            each(images())
        with torch.inference_mode():
            each(images())

    assert_same(state_of(naive), state_of(model))
    assert not memopt.explain(model).ran


def test_a_new_shape_is_recorded_anew() -> None:
    naive, model = dense_net(), rewritten_copy(dense_net())

    for x in (images(2), images(3), images(2, size=8), images(2)):
        assert_trains_alike(naive, model, x, steps=1)


@pytest.mark.parametrize("change", ["eval", "classifier", "norm", "conv", "frozen", "double", "momentum", "hook"])
def test_changes_after_apply_are_honoured(change: str) -> None:
    naive, model = dense_net(), rewritten_copy(dense_net())
    assert_trains_alike(naive, model, images(), steps=1)
    dtype = torch.float64 if change == "double" else torch.float32

    for each in (naive, model):
        _change(each, change)

    assert_trains_alike(naive, model, images(dtype=dtype), at_least=0)
    assert_rewritten(model)


def _change(model: nn.Module, change: str) -> None:
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    torch.manual_seed(5)
    if change == "eval":
        model.eval()
    elif change == "frozen":
        next(iter(model.children())).requires_grad_(False)
    elif change == "double":
        model.double()
    elif change == "momentum":
        for norm in norms:
            norm.momentum, norm.eps = 0.3, 0.1
    elif change == "hook":
        norms[1].register_forward_hook(lambda module, inputs, output: output * 0.5)
    else:
        kinds = {"classifier": nn.Linear, "norm": nn.BatchNorm2d, "conv": nn.Conv2d}
        name = [n for n, m in model.named_modules() if isinstance(m, kinds[change])][-1]
        parent = model.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], _another(model.get_submodule(name)))


def _another(old: nn.Module) -> nn.Module:
    if isinstance(old, nn.Linear):
        return nn.Linear(old.in_features, 7)
    if isinstance(old, nn.BatchNorm2d):
        return nn.BatchNorm2d(old.num_features, eps=0.1)
    assert isinstance(old, nn.Conv2d)
    return nn.Conv2d(old.in_channels, old.out_channels, old.kernel_size, padding=old.padding, bias=True)


@pytest.mark.parametrize("call", ["directly", "inside modules", "after a hook"])
def test_the_warning_points_at_the_users_call(call: str) -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.weight if bool(x.sum() > 0) else x

    model: nn.Module = memopt.apply(Branching())
    if call == "after a hook":
        model.register_forward_hook(lambda module, args, output: None)
    elif call == "inside modules":
        model = nn.Sequential(nn.Sequential(model))

    line = sys._getframe().f_lineno + 2
    with pytest.warns(UserWarning, match="memopt left Branching as it is") as caught:
        model(images())

    (warning,) = caught
    assert (warning.filename, warning.lineno) == (__file__, line)


def test_replicas_of_data_parallel_run_on_their_own_weights() -> None:
    naive, model = dense_net(), rewritten_copy(dense_net())
    results: dict[tuple[int, bool], list[torch.Tensor]] = {}

    def work(number: int, original: nn.Module) -> None:
        replica = _replicate(original, 1.0 + number)
        output = replica(images(seed=number))
        output.square().mean().backward()
        weights = [m.weight.grad for m in replica.modules() if isinstance(m, nn.Conv2d)]
        results[number, original is model] = [output.detach(), *weights]

    threads = [threading.Thread(target=work, args=(n, each)) for n in (0, 1) for each in (naive, model)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert memopt.explain(model).ran
    for number in (0, 1):
        pairs = zip(results[number, False], results[number, True], strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(results[0, True][0], results[1, True][0])


def _replicate(model: nn.Module, scale: float) -> nn.Module:
    """As nn.parallel.replicate does, on one device: parameters become plain attributes."""
    modules = list(model.modules())
    replicas = {module: module._replicate_for_data_parallel() for module in modules}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            replica._modules[name] = replicas[child]
        for name, parameter in module._parameters.items():
            replica._parameters[name] = None
            if parameter is not None:
                del replica._parameters[name]
                copied = parameter.detach().clone().requires_grad_() * scale
                copied.retain_grad()
                setattr(replica, name, copied)
        for name, buffer in module._buffers.items():
            replica._buffers[name] = None if buffer is None else buffer.clone()
    return replicas[model]


def test_compiled_after_apply_it_stays_small_and_equal() -> None:
    torch._dynamo.reset()
    naive, model = dense_net(), rewritten_copy(dense_net())
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter)
    plain_bytes = _saved_bytes(rewritten_copy(dense_net()))
    frames: list[int] = []

    for _ in range(4):
        expected = train_step(naive, (images(),))
        with_compile = train_step(compiled, (images(),))
        assert_same(expected, {name.replace("_orig_mod.", ""): value for name, value in with_compile.items()})
        frames.append(counter.frame_count)

    assert frames[1] == frames[-1]
    assert _saved_bytes(torch.compile(rewritten_copy(dense_net()), backend="eager")) <= 1.05 * plain_bytes


def _saved_bytes(model: nn.Module) -> int:
    x = images()
    model(x)
    with StorageTracker() as tracker:
        tracker.track(model, x)
        before = tracker.current_bytes
        output = model(x)
        saved = tracker.current_bytes - before
        del output
    return saved


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_tools_that_trace_see_the_users_own_forward() -> None:
    naive, model = dense_net().eval(), rewritten_copy(dense_net()).eval()
    x = images()

    exported = torch.export.export(model, (x,))
    symbolic = torch.fx.symbolic_trace(model)
    traced = torch.jit.trace(model, x, check_trace=False)

    assert torch.equal(exported.module()(x), naive(x))
    assert sum(node.op == "call_module" for node in symbolic.graph.nodes) > 5
    assert torch.equal(traced(x), naive(x))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_around_the_whole_model(reentrant: bool) -> None:
    class Around(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> Any:
            return checkpoint(self.inner, x, use_reentrant=reentrant)

    naive, model = Around(dense_net()), Around(rewritten_copy(dense_net()))

    assert_trains_alike(naive, model, images(), input_gradients=True, at_least=0)
    assert_rewritten(model.inner)


def test_saved_tensors_pass_through_hooks() -> None:
    naive, model = dense_net(), rewritten_copy(dense_net())
    model(images())

    with torch.autograd.graph.save_on_cpu():
        expected, actual = train_step(naive, (images(),)), train_step(model, (images(),))

    assert_same(expected, {**actual, **{k: v for k, v in expected.items() if k.startswith("buffer")}})


def test_functional_call_and_function_transforms() -> None:
    naive, model = dense_net().eval(), rewritten_copy(dense_net()).eval()
    parameters = {name: p.detach() * 1.1 for name, p in naive.named_parameters()}

    def loss(each: nn.Module, values: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(each, values, (images(),)).square().mean()

    for transform in (torch.func.grad, _gradients):
        expected, actual = (transform(lambda values, m=m: loss(m, values))(parameters) for m in (naive, model))
        assert all(torch.equal(expected[name], actual[name]) for name in parameters)


def _gradients(loss: Any) -> Any:
    def run(parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        leaves = {name: p.clone().requires_grad_() for name, p in parameters.items()}
        return dict(zip(leaves, torch.autograd.grad(loss(leaves), list(leaves.values())), strict=True))

    return run


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own formulas are scripts
def test_forward_mode_differentiation_runs_the_users_forward() -> None:
    naive, model = dense_net().eval(), rewritten_copy(dense_net()).eval()
    tangents = []
    for each in (naive, model):
        with forward_ad.dual_level():
            result = each(forward_ad.make_dual(images(), torch.ones_like(images())))
            tangents.append(forward_ad.unpack_dual(result).tangent)
    assert tangents[0] is not None
    assert torch.equal(*tangents)


class _Doubling(TorchFunctionMode):
    """Replaces a function, as a user's mode may."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result * 2 if getattr(func, "__name__", "") in ("relu", "relu_") else result


def test_a_mode_that_replaces_functions_is_heeded() -> None:
    naive, model = dense_net(), rewritten_copy(dense_net())
    for mode in (nullcontext(), _Doubling(), nullcontext()):
        with mode:
            expected, actual = train_step(naive, (images(),)), train_step(model, (images(),))
        assert_same(expected, actual)
    assert memopt.explain(model).ran


def test_empty_batches_and_inputs_with_attributes_run_the_users_forward() -> None:
    class Weighted(DenseNet):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * getattr(x, "weight", 1.0)

    naive, model = Weighted().eval(), memopt.apply(Weighted()).eval()
    model.load_state_dict(naive.state_dict())
    weighted: Any = images()
    weighted.weight = 3.0
    for x in (images(), weighted, torch.empty(0, 3, 6, 6), images()):
        assert torch.equal(naive(x), model(x))
    assert memopt.explain(model).ran


@pytest.mark.parametrize("numbers_first", [True, False])
def test_settings_of_torchs_modules_may_be_lists_in_some(numbers_first: bool) -> None:
    def make() -> nn.Module:
        model = dense_net()
        pools = [nn.AvgPool2d(2), nn.AvgPool2d([2, 2])]  # type: ignore[arg-type]
        same = nn.Conv2d(6, 6, 3, padding="same")
        upsampled = nn.Upsample(scale_factor=4)
        ordered = pools if numbers_first else pools[::-1]
        model.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), same, *ordered, upsampled)
        return unsettle(model)

    naive = make()
    model = memopt.apply(copy.deepcopy(naive))
    for size in (2, 1):
        for each in (naive, model):
            each.stem[2 + numbers_first].kernel_size = [size, size]
            each.stem[2 + numbers_first].stride = [size, size]
        assert_same(train_step(naive, (images(size=8),)), train_step(model, (images(size=8),)))
    assert len(memopt.explain(model).rewritten) == 7


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_called_as_they_are(kind: Any) -> None:
    def body(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        features = F.relu(m.norm(m.block(x)))
        return m.recurrent(features.mean(2).transpose(1, 2))[0]

    parts = {"block": lambda: DenseBlock(3, 4, 3), "norm": lambda: nn.BatchNorm2d(15), "recurrent": lambda: kind(15, 4)}
    model = plain(body, **parts)
    assert_exact(model, images(), at_least=4)
    rewritten = rewritten_copy(model)
    train_step(rewritten, (images(),))
    assert not any(isinstance(weight, FakeTensor) for weight in rewritten.recurrent._flat_weights)


def test_parametrizations_that_are_cached_around_a_step() -> None:
    naive = dense_net()
    parametrizations.weight_norm(naive.stem)
    parametrizations.weight_norm(naive.block2.layers[0].conv1)
    model = rewritten_copy(naive)
    for _ in range(2):
        assert_same(*(train_step(each, (images(),), context=parametrize.cached) for each in (naive, model)))
    assert memopt.explain(model).ran


def test_a_slice_of_a_sequential_is_looked_into() -> None:
    def body(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        x = m.stages[:1](x)
        return m.stages[1:](torch.cat([x, x], 1))

    parts = {"stages": lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1))}
    assert_exact(plain(body, **parts), images(), at_least=1)


def test_double_backward_fails_with_one_clear_message() -> None:
    model = rewritten_copy(dense_net())
    x = images().requires_grad_()

    (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)

    with pytest.raises(RuntimeError, match=r"Double backward is not supported; call memopt\.remove"):
        gradient.sum().backward()


def test_accumulation_two_forwards_and_retained_graphs() -> None:
    naive, model = dense_net(), rewritten_copy(dense_net())
    for each in (naive, model):
        first, second = each(images()), each(images(seed=2))
        (first.mean() + second.square().mean()).backward(retain_graph=True)
        first.sum().backward()

    assert_same(state_of(naive), state_of(model))


def test_weights_changed_before_backward_are_noticed() -> None:
    model = rewritten_copy(dense_net())
    loss = model(images()).mean()
    with torch.no_grad():
        next(m for m in list(model.modules())[::-1] if isinstance(m, nn.Conv2d)).weight.mul_(2)

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_nothing_stays_allocated_between_steps() -> None:
    model = rewritten_copy(dense_net())
    x = images()
    model(x).mean().backward()
    model.zero_grad()
    with StorageTracker() as tracker:
        tracker.track(model, x)
        before = tracker.current_bytes
        model(x).mean().backward()
        model.zero_grad()
        assert tracker.current_bytes == before


def test_two_copies_do_not_share_state() -> None:
    first = rewritten_copy(dense_net())
    second = copy.deepcopy(first)
    outputs = first(images()), second(images(seed=2))
    naive = dense_net(), dense_net()

    for each, output, seed in zip((first, second), outputs, (1, 2), strict=True):
        output.sum().backward()
        reference = naive[seed - 1]
        reference(images(seed=seed)).sum().backward()
        assert_same(state_of(reference), state_of(each))

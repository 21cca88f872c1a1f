"""The fast runtime: as close to float64 as eager, and everything else as in eager. On a CPU by the references."""

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import memopt
from densenet_models import bc, growing, plain, signal, volumetric
from memopt.measure.bound import measure_distance
from memopt.measure.memory import leave
from memopt.measure.predict import predict_step
from memopt.measure.tracker import StorageTracker
from tests.helpers import LEVELS, Plain, dense_net, images, train_step, unsettle
from tests.helpers import plain as made

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "bc": (partial(bc.DenseNet, depth=16), (4, 3, 16, 16)),
    "bc with dropout": (partial(bc.DenseNet, depth=16, drop_rate=0.2), (4, 3, 16, 16)),
    "imagenet stem": (partial(bc.DenseNet, block_config=(2, 3), growth_rate=8, small_inputs=False), (2, 3, 64, 64)),
    "growing": (partial(growing.DenseNet, depth=16, growth_rate=8), (4, 3, 16, 16)),
    "prepended": (partial(growing.DenseNet, depth=16, growth_rate=5, prepend=True), (4, 3, 16, 16)),
    "plain": (partial(plain.DenseNet, depth=10, growth_rate=8, drop_rate=0.1), (4, 3, 16, 16)),
    "volumetric": (volumetric.DenseNet, (2, 1, 16, 16, 16)),
    "signal": (signal.DenseNet, (4, 12, 128)),
}


@pytest.fixture(autouse=True)
def _single_precision() -> Iterator[None]:
    """cuDNN leaves TF32 aside for some small convolutions: then eager is nearer than it asks for. See tests/gpu."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def fast(model: nn.Module, level: str = "layer") -> nn.Module:
    return memopt.apply(copy.deepcopy(model), config=memopt.Config(numerics="fast", recompute=level))


def assert_all_fast(model: nn.Module) -> None:
    explanation = memopt.explain(model)
    assert explanation.ran
    assert {chain.numerics for chain in explanation.chains} == {"fast"}, str(explanation)


def small_net(**arguments: Any) -> nn.Module:
    return dense_net(**arguments).to(DEVICE)


def assert_near(expected: dict[str, Any], actual: dict[str, Any], tolerance: float = 1e-4) -> None:
    """Each tensor to `tolerance` of its norm; what is nothing but rounding (a bias before a norm) to that of all."""
    assert expected.keys() == actual.keys()
    norms = {n: t.double().norm() for n, t in expected.items() if t is not None and t.is_floating_point()}
    rounding = 1e-6 * torch.stack(list(norms.values())).norm()
    for name, value in expected.items():
        if name not in norms:
            assert (value is None) == (actual[name] is None), name
        else:
            assert (actual[name].double() - value.double()).norm() <= tolerance * norms[name] + rounding, name


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODELS)
def test_within_the_bound(name: str, train: bool, level: str) -> None:
    make, shape = MODELS[name]
    torch.manual_seed(0)
    naive = make().to(DEVICE).train(train)
    x = torch.randn(shape, device=DEVICE)
    rewritten = fast(naive, level)

    distance = measure_distance(naive, rewritten, (x,), seeds=5 if level == "layer" else 3)

    assert distance.within_bound, distance
    rewritten(x)
    assert_all_fast(rewritten)


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["bc", "prepended", "plain", "signal"])
def test_within_the_bound_under_autocast(name: str, amp: torch.dtype) -> None:
    if amp is torch.float16 and DEVICE == "cpu":
        amp = torch.bfloat16
    make, shape = MODELS[name]
    torch.manual_seed(0)
    naive = make().to(DEVICE)
    x = torch.randn(shape, device=DEVICE)

    distance = measure_distance(naive, fast(naive), (x,), amp=amp)

    assert distance.within_bound, distance


def test_inputs_far_from_zero() -> None:
    """Channel means 100 times the deviation."""
    naive = small_net()
    nn.init.constant_(naive.stem.weight, 0.3)
    x = images(8).to(DEVICE) + 100.0

    distance = measure_distance(naive, fast(naive), (x,))

    assert distance.within_bound, distance


def test_same_bits_from_run_to_run() -> None:
    naive = small_net()
    first, second = (train_step(fast(naive), (images().to(DEVICE),)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first if first[name] is not None)


def test_recompute_levels_have_the_same_bits() -> None:
    naive = small_net()
    first, second = (train_step(fast(naive, level), (images().to(DEVICE),)) for level in LEVELS)
    assert all(torch.equal(first[name], second[name]) for name in first if first[name] is not None)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"momentum": None},
        {"momentum": 0.3},
        {"track_running_stats": False},
        {"affine": False},
        {"eps": 0.3},
    ],
    ids=str,
)
def test_running_statistics_change_once_a_step(settings: dict[str, Any]) -> None:
    def body(net: Plain, x: torch.Tensor) -> torch.Tensor:
        x = net.stem(x)
        new = net.conv1(F.relu(net.norm1(x)))
        return net.conv2(F.relu(net.norm2(torch.cat([x, new], 1))))

    naive = made(
        body,
        stem=lambda: nn.Conv2d(3, 4, 3),
        norm1=lambda: nn.BatchNorm2d(4, **settings),
        conv1=lambda: nn.Conv2d(4, 3, 3, padding=1),
        norm2=lambda: nn.BatchNorm2d(7, **settings),
        conv2=lambda: nn.Conv2d(7, 5, 1),
    ).to(DEVICE)
    rewritten = fast(naive)
    for step in range(3):
        x = images(seed=step).to(DEVICE)
        assert_near(train_step(naive, (x,)), train_step(rewritten, (x,)))
    assert_all_fast(rewritten)
    for name, buffer in naive.named_buffers():
        torch.testing.assert_close(dict(rewritten.named_buffers())[name], buffer, rtol=1e-5, atol=1e-7)


def test_a_norm_shared_by_two_layers_updates_twice() -> None:
    def body(net: Plain, x: torch.Tensor) -> torch.Tensor:
        first = net.stem(x)
        second = net.conv(F.relu(net.norm(first)))
        third = net.conv(F.relu(net.norm(second)))
        return torch.cat([first, second, third], 1)

    naive = made(
        body, stem=lambda: nn.Conv2d(3, 4, 3), norm=lambda: nn.BatchNorm2d(4), conv=lambda: nn.Conv2d(4, 4, 1)
    ).to(DEVICE)
    rewritten = fast(naive)
    for _ in range(2):
        assert_near(train_step(naive, (images().to(DEVICE),)), train_step(rewritten, (images().to(DEVICE),)))
    assert_all_fast(rewritten)


def test_frozen_norms_and_frozen_stem() -> None:
    naive = small_net()
    naive.stem.requires_grad_(False)
    naive.block1.layers[1].norm1.eval().requires_grad_(False)
    naive.block2.layers[0].norm2.eval()
    rewritten = fast(naive)
    assert_near(train_step(naive, (images().to(DEVICE),)), train_step(rewritten, (images().to(DEVICE),)))
    assert_all_fast(rewritten)


@pytest.mark.parametrize(
    "activation",
    [
        nn.ReLU6,
        nn.SiLU,
        nn.GELU,
        partial(nn.GELU, "tanh"),
        nn.Hardswish,
        nn.Sigmoid,
        nn.Tanh,
        partial(nn.ELU, 0.7),
        partial(nn.LeakyReLU, 0.2, inplace=True),
        nn.Identity,
    ],
    ids=str,
)
def test_activations(activation: Callable[[], nn.Module]) -> None:
    naive = small_net()
    for block in (naive.block1, naive.block2):
        for layer in block.layers:
            layer.relu1, layer.relu2 = activation(), activation()
    rewritten = fast(naive)
    assert_near(train_step(naive, (images().to(DEVICE),)), train_step(rewritten, (images().to(DEVICE),)))
    assert_all_fast(rewritten)


def test_gradients_of_inputs_and_of_features_read_elsewhere() -> None:
    def body(net: Plain, x: torch.Tensor) -> Any:
        new = net.conv1(F.relu(net.norm1(x)))
        both = torch.cat([x, new], 1)
        out = net.conv2(F.relu(net.norm2(both)))
        return out, both.mean(), x.square().sum(), new.amax()

    naive = made(
        body,
        norm1=lambda: nn.BatchNorm2d(3),
        conv1=lambda: nn.Conv2d(3, 3, 3, padding=1),
        norm2=lambda: nn.BatchNorm2d(6),
        conv2=lambda: nn.Conv2d(6, 5, 3, stride=2),
    ).to(DEVICE)
    rewritten = fast(naive)
    x = images().to(DEVICE)
    expected, actual = (train_step(model, (x,), input_gradients=True) for model in (naive, rewritten))
    assert_near(expected, actual)
    assert_all_fast(rewritten)


def _accumulated(model: nn.Module) -> None:
    for seed in range(2):
        model(images(seed=seed).to(DEVICE)).square().sum().backward()


def _two_forwards(model: nn.Module) -> None:
    losses = [model(images(seed=seed).to(DEVICE)).square().sum() for seed in range(2)]
    (losses[0] + losses[1]).backward()


def _twice(model: nn.Module) -> None:
    loss = model(images().to(DEVICE)).square().sum()
    loss.backward(retain_graph=True)
    loss.backward()


def _checkpointed(model: nn.Module) -> None:
    x = images().to(DEVICE).requires_grad_()
    checkpoint(model, x, use_reentrant=False).square().sum().backward()


def _offloaded(model: nn.Module) -> None:
    with torch.autograd.graph.save_on_cpu():
        loss = model(images().to(DEVICE)).square().sum()
    loss.backward()


@pytest.mark.parametrize("train", [_accumulated, _two_forwards, _twice, _checkpointed, _offloaded])
def test_ways_to_run_backward(train: Callable[[nn.Module], None]) -> None:
    naive = small_net()
    results = []
    for model in (naive, fast(naive)):
        train(model)
        results.append({name: p.grad for name, p in model.named_parameters()})
    assert_near(*results)


def test_double_backward_is_one_clear_error() -> None:
    rewritten = fast(small_net())
    x = images().to(DEVICE).requires_grad_()
    (gradient,) = torch.autograd.grad(rewritten(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="Double backward is not supported"):
        gradient.sum().backward()


def test_layout_of_what_leaves_a_region_is_eagers() -> None:
    """Code behind a block may flatten with `view`, which channels-last does not allow."""
    naive = made(
        lambda net, x: net.norm(torch.cat([x, net.stem(x)], 1)).view(len(x), -1),
        stem=lambda: nn.Conv2d(3, 4, 1),
        norm=lambda: nn.BatchNorm2d(7),
    ).to(DEVICE)
    rewritten = fast(naive)
    assert_near(train_step(naive, (images().to(DEVICE),)), train_step(rewritten, (images().to(DEVICE),)))
    assert_all_fast(rewritten)


def test_gradients_of_1x1_weights_have_the_strides_of_their_parameters() -> None:
    # DistributedDataParallel compares all strides with its bucket's, those of sizes of one as well.
    model = fast(bc.DenseNet(depth=22).to(DEVICE))
    different = []
    for name, parameter in model.named_parameters():
        if parameter.dim() == 4 and parameter[0, 0].numel() == 1:

            def compare(gradient: torch.Tensor, name: str = name, parameter: torch.Tensor = parameter) -> None:
                if gradient.stride() != parameter.stride():
                    different.append((name, gradient.stride(), parameter.stride()))

            parameter.register_hook(compare)
    model(torch.randn(2, 3, 32, 32, device=DEVICE)).sum().backward()
    assert not different


def test_channels_last_models() -> None:
    naive = small_net().to(memory_format=torch.channels_last)
    rewritten = fast(naive)
    x = images().to(DEVICE).contiguous(memory_format=torch.channels_last)
    assert_near(train_step(naive, (x,)), train_step(rewritten, (x,)))
    assert_all_fast(rewritten)


def _group_norm(net: Any) -> None:
    net.block1.layers[1].norm1 = nn.GroupNorm(2, 10)


def _double(net: Any) -> None:
    net.double()


@pytest.mark.parametrize(
    ("change", "reason"),
    [(_group_norm, "no batch norm"), (_double, "no kernels for torch.float64")],
)
def test_what_fused_kernels_cannot_do_runs_exactly(change: Callable[[nn.Module], None], reason: str) -> None:
    naive = small_net()
    change(naive)
    naive.to(DEVICE)
    rewritten = fast(naive)
    x = images().to(DEVICE).to(naive.classifier.weight.dtype)
    assert_near(train_step(naive, (x,)), train_step(rewritten, (x,)))
    explanation = memopt.explain(rewritten)
    assert explanation.ran
    assert "exact" in {chain.numerics for chain in explanation.chains}
    assert any(reason in note for note in explanation.notes), explanation.notes


def test_order_of_concats_decides_the_layout() -> None:
    def body(net: Plain, x: torch.Tensor) -> torch.Tensor:
        first = net.stem(x)
        second = net.conv(F.relu(net.norm1(torch.cat([x, first], 1))))
        return net.norm2(torch.cat([first, x, second], 1))

    naive = unsettle(
        made(
            body,
            stem=lambda: nn.Conv2d(3, 3, 1),
            norm1=lambda: nn.BatchNorm2d(6),
            conv=lambda: nn.Conv2d(6, 3, 1),
            norm2=lambda: nn.BatchNorm2d(9),
        )
    ).to(DEVICE)
    rewritten = fast(naive)
    assert_near(train_step(naive, (images().to(DEVICE),)), train_step(rewritten, (images().to(DEVICE),)))
    assert any("several orders" in note for note in memopt.explain(rewritten).notes)


def test_apply_verifies_by_the_bound() -> None:
    config = memopt.Config(numerics="fast")
    assert_all_fast_after = memopt.apply(small_net(), (images().to(DEVICE),), config=config)
    assert {c.numerics for c in memopt.explain(assert_all_fast_after).chains} == {"fast"}


def test_a_wrong_gradient_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from memopt.runtime.fused import backward

    finish = backward.finish_norm
    monkeypatch.setattr(backward, "finish_norm", lambda *args: finish(*args[:4], args[4] + 1, *args[5:]))
    with pytest.raises(memopt.EquivalenceError):
        memopt.apply(small_net(), (images().to(DEVICE),), config=memopt.Config(numerics="fast"))


def test_nothing_of_a_step_stays_alive() -> None:
    """Without the garbage collector."""
    rewritten = fast(small_net())
    x = images().to(DEVICE)

    def step() -> None:
        rewritten(x).square().sum().backward()
        rewritten.zero_grad(set_to_none=True)

    with StorageTracker() as tracker:
        step()
        gc.collect()
        gc.disable()
        try:
            before_bytes = tracker.current_bytes
            step()
            assert tracker.current_bytes == before_bytes
        finally:
            gc.enable()


@pytest.mark.parametrize(("level", "ratio"), [("layer", 0.10), ("concat", 0.22)])
def test_predicted_activation_peak_of_bc_100(level: str, ratio: float) -> None:
    def peak(apply: Callable[[nn.Module], nn.Module]) -> int:
        figure = predict_step(bc.DenseNet, (torch.empty(64, 3, 32, 32),), apply=apply).activation_peak_bytes
        assert figure is not None
        return figure

    config = memopt.Config(numerics="fast", recompute=level)
    assert peak(lambda model: memopt.apply(model, config=config)) <= ratio * peak(leave)


@pytest.mark.parametrize("context", [nullcontext, torch.no_grad], ids=["gradients", "no_grad"])
def test_random_numbers_are_drawn_as_in_eager(context: Callable[[], Any]) -> None:
    naive = bc.DenseNet(depth=10, drop_rate=0.3).to(DEVICE)
    x = torch.randn(2, 3, 8, 8, device=DEVICE)
    outputs = []
    for model in (naive, fast(naive)):
        torch.manual_seed(5)
        with context():
            outputs.append(model(x).detach())
    assert (outputs[0] - outputs[1]).norm() <= 1e-4 * outputs[0].norm()


class _Launches(TorchDispatchMode):
    """Counts operators that launch kernels: neither views nor allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.fused, self.other = 0, 0
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        if func.namespace == "memopt":
            self.fused += 1
        elif not func.is_view and not func.name().startswith(("aten::empty", "aten::detach", "aten::alias")):
            self.other += 1
        return func(*args, **(kwargs or {}))


def test_operators_a_step() -> None:
    """A launch costs more than many of these kernels take: per dense layer, 5 forward and 8 backward."""
    shallow, deep = (fast(bc.DenseNet(depth=depth)) for depth in (16, 40))
    counts = []
    for model in (shallow, deep):
        x = torch.randn(2, 3, 8, 8)
        model(x).sum().backward()  # recorded
        model.zero_grad(set_to_none=True)
        with _Launches() as launches:
            model(x).sum().backward()
        counts.append((launches.fused, launches.other))
    layers = (40 - 16) // 2

    fused, other = (after - before for before, after in zip(*counts, strict=True))
    assert fused <= 13 * layers
    assert other == 0


@pytest.mark.parametrize("amp", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ["bc", "plain", "narrow signal"])
def test_weight_gradients_of_wide_convolutions(
    name: str, level: str, amp: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Computed from what the norm reads: cuDNN would want the normalised tensor again."""
    monkeypatch.setattr("memopt.plan.fused.MAX_WEIGHT_CHANNELS", 64)
    monkeypatch.setattr("memopt.plan.fused.MAX_CONV_CHANNELS", 0)
    make, shape = (MODELS | {"narrow signal": (lambda: _transition(nn.AvgPool1d(2), 1), (4, 3, 24))})[name]
    torch.manual_seed(0)
    naive = make().to(DEVICE)
    rewritten = fast(naive, level)
    x = torch.randn(shape, device=DEVICE)

    distance = measure_distance(naive, rewritten, (x,), amp=amp)

    assert distance.within_bound, distance
    names = _operators(rewritten, x)
    layers = names.count("memopt::norm_act_conv_weight")
    assert layers >= 1
    again = names[names.index("aten::convolution_backward") :]
    assert again.count("memopt::norm_act") <= names.count("memopt::norm_act") - layers


def test_a_frozen_wide_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memopt.plan.fused.MAX_WEIGHT_CHANNELS", 64)
    monkeypatch.setattr("memopt.plan.fused.MAX_CONV_CHANNELS", 0)
    naive = small_net()
    naive.block1.layers[1].conv2.weight.requires_grad_(False)
    rewritten = fast(naive)
    assert_near(train_step(naive, (images().to(DEVICE),)), train_step(rewritten, (images().to(DEVICE),)))
    assert_all_fast(rewritten)


def test_weights_of_convolutions_are_laid_out_once_a_step() -> None:
    """cuDNN would do it in forward and in backward, for every 3 × 3 convolution of a wide layer."""
    model = fast(bc.DenseNet(block_config=(2,), growth_rate=24))
    x = torch.randn(2, 3, 8, 8)
    train_step(model, (x,))
    layouts: list[bool] = []

    class Weights(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            place = {"aten::convolution": 1, "aten::convolution_backward": 2}.get(func.name())
            if place is not None and args[place].shape[:2] == (24, 96):
                layouts.append(args[place].is_contiguous(memory_format=torch.channels_last))
            return func(*args, **(kwargs or {}))

    with Weights():
        train_step(model, (x,))

    assert layouts == [True] * 4  # two layers, forward and backward


def _transition(pool: Callable[[torch.Tensor], Any], dimensions: int = 2) -> nn.Module:
    """A layer, and a transition that ends with a pooling."""
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dimensions - 1]

    def body(net: Plain, x: torch.Tensor) -> torch.Tensor:
        x = net.stem(x)
        x = torch.cat([x, net.conv(F.relu(net.norm1(x)))], 1)
        return (net.pool if isinstance(pool, nn.Module) else pool)(net.narrow(F.relu(net.norm2(x))))

    return unsettle(
        made(
            body,
            stem=lambda: conv(3, 5, 3, padding=1),
            norm1=lambda: norm(5),
            conv=lambda: conv(5, 4, 3, padding=1),
            norm2=lambda: norm(9),
            narrow=lambda: conv(9, 7, 1),
            pool=lambda: pool if isinstance(pool, nn.Module) else nn.Identity(),
        )
    )


def _operators(model: nn.Module, x: torch.Tensor) -> list[str]:
    train_step(model, (x,))  # recorded
    with _Launches() as launches:
        train_step(model, (x,))
    return launches.names


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("amp", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("pool", "shape"),
    [
        (nn.AvgPool2d(2), (4, 3, 8, 6)),
        (partial(F.avg_pool2d, kernel_size=(4, 3), stride=[4, 3]), (2, 3, 8, 6)),
        (nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False), (2, 3, 8, 6)),
        (nn.AvgPool1d(2), (4, 3, 24)),
        (partial(F.avg_pool1d, kernel_size=3), (4, 3, 24)),
    ],
    ids=["2d", "oblong", "ceiling", "1d", "1d-called"],
)
def test_a_transition_averages_before_it_convolves(
    pool: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, ...], amp: torch.dtype | None, level: str
) -> None:
    naive = _transition(pool, len(shape) - 2).to(DEVICE)
    rewritten = fast(naive, level)
    x = torch.randn(shape, device=DEVICE)

    distance = measure_distance(naive, rewritten, (x,), amp=amp, seeds=5 if amp is None else 11)

    assert distance.within_bound, distance
    assert_all_fast(rewritten)
    names = _operators(rewritten, x)
    assert names.count("memopt::norm_act_pool") == 2  # again in backward
    assert not any("avg_pool" in name for name in names)


@pytest.mark.parametrize(
    ("pool", "shape"),
    [
        (nn.AvgPool2d(3, 2), (2, 3, 9, 9)),
        (nn.AvgPool2d(2, padding=1), (2, 3, 8, 8)),
        (nn.AvgPool2d(2, divisor_override=3), (2, 3, 8, 8)),
        (nn.AvgPool2d(2), (2, 3, 9, 8)),
        (nn.AvgPool2d(2, ceil_mode=True), (2, 3, 9, 8)),
        (nn.AvgPool2d(5), (2, 3, 10, 10)),
        (nn.AvgPool3d(2), (2, 3, 4, 4, 4)),
        (nn.MaxPool2d(2), (2, 3, 8, 8)),
        (lambda y: F.avg_pool2d(F.relu(y), 2), (2, 3, 8, 8)),
    ],
    ids=["overlapping", "padded", "divisor", "ragged", "ragged-ceiling", "fives", "3d", "maximum", "after-relu"],
)
def test_other_poolings_stay_behind_the_convolution(
    pool: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, ...]
) -> None:
    naive = _transition(pool, len(shape) - 2).to(DEVICE)
    rewritten = fast(naive)
    x = torch.randn(shape, device=DEVICE)

    assert_near(train_step(naive, (x,)), train_step(rewritten, (x,)))

    assert "memopt::norm_act_pool" not in _operators(rewritten, x)


def test_a_convolution_that_is_read_twice_is_not_put_behind_a_pooling() -> None:
    naive = _transition(lambda y: (F.avg_pool2d(y, 2), y.mean())).to(DEVICE)
    rewritten = fast(naive)
    x = torch.randn(2, 3, 8, 8, device=DEVICE)
    assert_near(train_step(naive, (x,)), train_step(rewritten, (x,)))
    assert "memopt::norm_act_pool" not in _operators(rewritten, x)

"""Small dense networks, and what it means that a rewritten model trains as the untouched one does."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import memopt
from memopt.measure.bits import same_bits

LEVELS = ("layer", "concat")

Observed = dict[str, torch.Tensor | None]
MakeContext = Callable[[], AbstractContextManager[Any]]


class DenseLayer(nn.Module):
    """Concat, norm, ReLU, 1x1 convolution, norm, ReLU, 3x3 convolution."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(channels, 2 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(2 * growth)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(2 * growth, growth, 3, padding=1)

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        x = torch.cat(features, 1)
        return self.conv2(self.relu2(self.norm2(self.conv1(self.relu1(self.norm1(x))))))


class DenseBlock(nn.Module):
    """Layers that read everything before them; returns the concat of all features."""

    def __init__(self, channels: int, growth: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DenseLayer(channels + i * growth, growth) for i in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(features))
        return torch.cat(features, 1)


class DenseNet(nn.Module):
    """Stem, block of three layers, transition, block of two, final norm, classifier."""

    def __init__(self, growth: int = 4, stem: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, stem, 3, padding=1, bias=False)
        self.block1 = DenseBlock(stem, growth, 3)
        width = stem + 3 * growth
        self.transition = nn.Sequential(
            nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.Conv2d(width, 8, 1, bias=False), nn.AvgPool2d(2)
        )
        self.block2 = DenseBlock(8, growth, 2)
        self.final = nn.Sequential(nn.BatchNorm2d(8 + 2 * growth), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1))
        self.classifier = nn.Linear(8 + 2 * growth, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.block2(self.transition(self.block1(self.stem(x))))
        return self.classifier(self.final(x).flatten(1))


class Plain(nn.Module):
    """Base of the one-off models in tests: a stem, and a `forward` written in the test itself."""

    def __init__(self, body: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.body = body
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, *args: Any) -> Any:
        return self.body(self, *args)


def dense_net(seed: int = 0, **arguments: Any) -> DenseNet:
    """The same small DenseNet at every call, in training mode, with parameters that are not all alike."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DenseNet(**arguments)
        unsettle(model)
    return model


def unsettle(model: nn.Module) -> nn.Module:
    """Give norms weights, biases and running statistics other than ones and zeros."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm):
            for tensor in (module.weight, module.bias):
                if tensor is not None:
                    nn.init.normal_(tensor, 0.5, 0.5)
            if getattr(module, "running_mean", None) is not None:
                nn.init.normal_(module.running_mean, 0.0, 0.3)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model


def plain(body: Callable[..., Any], seed: int = 0, **parts: Callable[[], nn.Module]) -> nn.Module:
    """A model from its parts and a forward; the same parameters at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return unsettle(Plain(body, **{name: make() for name, make in parts.items()}))


def images(batch: int = 2, size: int = 6, seed: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, size, size, generator=generator).to(dtype)


def rewritten_copy(model: nn.Module, recompute: str = "layer", **config: Any) -> nn.Module:
    """A deep copy with memopt in force."""
    return memopt.apply(copy.deepcopy(model), config=memopt.Config(recompute=recompute, **config))


def assert_rewritten(model: nn.Module, at_least: int = 1) -> None:
    """The rewritten forward has run, and `at_least` so many chains run in it."""
    explanation = memopt.explain(model)
    assert explanation.ran, str(explanation)
    assert len(explanation.rewritten) >= at_least, str(explanation)


def reasons(model: nn.Module) -> str:
    """Every reason that `explain` gives, joined."""
    explanation = memopt.explain(model)
    return "; ".join([*(chain.reason or "" for chain in explanation.rejected), *explanation.notes])


def total(outputs: Any) -> torch.Tensor:
    """A loss that weighs every element of every output differently."""
    leaves = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    losses = [(leaf * torch.linspace(0.5, 1.5, leaf.numel()).view(leaf.shape).to(leaf)).sum() for leaf in leaves]
    return torch.stack([loss.double() for loss in losses]).sum()


def state_of(model: nn.Module) -> Observed:
    """Parameters, their gradients and buffers, as copies."""
    observed: Observed = {}
    for name, parameter in model.named_parameters():
        observed[f"parameter {name}"] = parameter.detach().clone()
        observed[f"gradient {name}"] = None if parameter.grad is None else parameter.grad.detach().clone()
    for name, buffer in model.named_buffers():
        observed[f"buffer {name}"] = buffer.clone()
    return observed


def train_step(
    model: nn.Module,
    inputs: tuple[Any, ...],
    *,
    loss: Callable[[Any], torch.Tensor] = total,
    context: MakeContext = nullcontext,
    input_gradients: bool = False,
) -> Observed:
    """Forward, backward and SGD from one random seed; everything that can be seen of it."""
    torch.manual_seed(7)
    inputs = tuple(
        x.detach().clone().requires_grad_() if input_gradients and x.is_floating_point() else x for x in inputs
    )
    with context():
        outputs = model(*inputs)
        value = loss(outputs)
    value.backward()
    observed: Observed = {
        f"output {i}": leaf.detach().clone()
        for i, leaf in enumerate(tree_leaves(outputs))
        if isinstance(leaf, torch.Tensor)
    }
    observed |= {f"gradient of input {i}": x.grad for i, x in enumerate(inputs)} if input_gradients else {}
    observed |= state_of(model)
    observed["random numbers"] = torch.get_rng_state()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.01 * parameter.grad
    model.zero_grad(set_to_none=True)
    return observed


def assert_same(expected: Observed, actual: Observed) -> None:
    assert expected.keys() == actual.keys()
    differing = [name for name in expected if not same_bits(expected[name], actual[name])]
    assert not differing, differing


def assert_trains_alike(
    naive: nn.Module, rewritten: nn.Module, *inputs: Any, steps: int = 2, at_least: int = 1, **options: Any
) -> None:
    """Train both for some steps; every bit of each step is the same. Something must have been rewritten."""
    for _ in range(steps):
        expected = train_step(naive, inputs, **options)
        assert_same(expected, train_step(rewritten, inputs, **options))
    if at_least:
        assert_rewritten(rewritten, at_least)


def assert_exact(model: nn.Module, *inputs: Any, at_least: int = 1, **options: Any) -> None:
    """A rewritten copy trains as the model does, at both recompute levels."""
    start = copy.deepcopy(model)
    for level in LEVELS:
        naive = copy.deepcopy(start)
        assert_trains_alike(naive, rewritten_copy(start, level), *inputs, at_least=at_least, **options)


@contextmanager
def counted_saves(sizes: list[int]) -> Iterator[None]:
    """Note the bytes of every storage that autograd saves, once each."""
    seen: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen[storage._cdata] = storage
            sizes.append(storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield


def assert_everything_stays(model: nn.Module, *inputs: torch.Tensor) -> None:
    """What can be seen of a model is the same before and after `apply`, a forward and a step, and after `remove`.

    That is its repr, keys of its state, attributes, parameters, methods, classes of its modules and hooks.
    """
    calls: list[str] = []
    model.register_forward_hook(lambda *_: calls.append("hook"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = _looks(model)
    user_classes = [type(module) for module in model.modules()]

    assert memopt.apply(model) is model
    assert _looks(model) == before
    model(*inputs)

    assert _looks(model) == before
    assert calls == ["hook"]
    assert all(isinstance(module, user) for module, user in zip(model.modules(), user_classes, strict=True))
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert all(a is b for a, b in zip(held, model.parameters(), strict=True))
    memopt.remove(model)
    assert _looks(model) == before
    assert [type(module) for module in model.modules()] == user_classes
    assert all("_memopt_dispatcher" not in vars(type(module)) for module in model.modules())


def _looks(model: nn.Module) -> tuple[object, ...]:
    return (
        repr(model),
        list(model.state_dict()),
        {name: id(value) for name, value in vars(model).items() if name not in ("training", *_counted(model))},
        [id(parameter) for parameter in model.parameters()],
        [name for name in dir(model) if not name.startswith("_")],
        [(name, type(module).__name__, type(module).__module__) for name, module in model.named_modules()],
        {name: len(module._forward_hooks) for name, module in model.named_modules()},
    )


def _counted(model: nn.Module) -> list[str]:
    """Numbers that a forward of the user's may change."""
    return [name for name, value in vars(model).items() if isinstance(value, int | float)]

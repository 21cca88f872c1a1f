"""What the model is fed when the user does not say: random data of a shape inferred from its first layer."""

import re
from collections.abc import Sequence

import torch
from torch import nn

from .errors import CommandError

# Spatial size and batch by the number of spatial dimensions; 0 is a model that begins with a linear layer.
SIZES = {0: (), 1: (1024,), 2: (224, 224), 3: (32, 32, 32)}
BATCHES = {0: 64, 1: 16, 2: 64, 3: 2}
SIZE_NAMES = {
    0: ("batch", "features"),
    1: ("batch", "channels", "length"),
    2: ("batch", "channels", "height", "width"),
    3: ("batch", "channels", "depth", "height", "width"),
}

# A first convolution 3x3 with stride 1 keeps the full size, which is how DenseNets for 32x32 images begin.
SMALL_SIZE = (32, 32)
# A batch of 64 images of 224x224 does not fit the memory, or the patience, of most machines without a GPU.
BATCH_OF_LARGE_IMAGES_ON_CPU = 8

DEFAULTS = (
    "Without --input the shape follows from the model's first convolution or linear layer. Images are 32x32 "
    "where that is a 3x3 convolution with stride 1, else 224x224, in batches of 64 (8 for 224x224 on a CPU); "
    "signals are 1024 long, in batches of 16; volumes 32x32x32, in batches of 2; vectors in batches of 64."
)

_CONVOLUTIONS: dict[type[nn.Module], int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}


def make_inputs(
    model: nn.Module, given: Sequence[str], batch_size: int | None, dtype: torch.dtype, device_type: str
) -> tuple[torch.Tensor, ...]:
    """Normal random tensors, the same at every call, on the CPU.

    Args:
        model: whose first layer the shape is inferred from.
        given: shapes as the user wrote them, "64x3x32x32", one for each argument of forward; empty to infer
            one.
        batch_size: of the inferred input; None for the default.
        dtype: of the tensors.
        device_type: where the model will run, for the default batch.

    Raises:
        CommandError: a shape does not parse, the shapes are of different batches, or none can be inferred.
    """
    if given and batch_size is not None:
        raise CommandError(
            "--batch-size and --input were both given. Leave --batch-size out: the first size of --input is the batch."
        )
    shapes = [_parse(text) for text in given] or [_inferred(model, batch_size, device_type)]
    _require_one_batch(shapes)
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def channels_of(model: nn.Module) -> int | None:
    """Channels that a model's first convolution takes; None where there is none, or it does not know them yet."""
    convolutions = (module for module in model.modules() if isinstance(module, tuple(_CONVOLUTIONS)))
    return next((int(module.in_channels) or None for module in convolutions), None)  # type: ignore[arg-type]


def missing_sizes(model: nn.Module, shape: Sequence[int]) -> str:
    """What a shape that a model refuses should consist of; "" where the number of its sizes is not the reason."""
    try:
        inferred = _inferred(model, None, "cuda")
    except CommandError:
        return ""
    if len(inferred) == len(shape):
        return ""
    example = "x".join(map(str, inferred))
    return f"By its first layer it takes {' x '.join(SIZE_NAMES[len(inferred) - 2])}, for example {example}. "


def _parse(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"-?\d+([x×]-?\d+)*", text):
        raise CommandError(f"--input {text!r} is not a shape. Write sizes joined by x, for example 64x3x32x32.")
    sizes = tuple(int(size) for size in re.split("[x×]", text))
    if min(sizes) < 1:
        raise CommandError(f"--input {text!r}: sizes must be positive, for example 64x3x32x32.")
    return sizes


def _require_one_batch(shapes: Sequence[tuple[int, ...]]) -> None:
    for shape in shapes:
        if shape[0] != shapes[0][0]:
            first, other = ("x".join(map(str, each)) for each in (shapes[0], shape))
            raise CommandError(
                f"--input {first} and --input {other} differ in their first size, which is the batch. Give every "
                "--input the same first size, or use memopt.compare in Python with inputs of your own."
            )


def _inferred(model: nn.Module, batch_size: int | None, device_type: str) -> tuple[int, ...]:
    for module in model.modules():
        for kind, dimensions in _CONVOLUTIONS.items():
            if isinstance(module, kind):
                channels = int(module.in_channels)  # type: ignore[arg-type]
                sizes = SMALL_SIZE if _keeps_size(module) else SIZES[dimensions]
                return _with_batch(channels, sizes, batch_size, device_type, type(module).__name__)
        if isinstance(module, nn.Linear):
            return _with_batch(module.in_features, (), batch_size, device_type, type(module).__name__)
    raise CommandError(
        f"{type(model).__name__} has no convolution or linear layer to infer the input's shape from. Give it "
        "with --input, for example --input 64x3x32x32."
    )


def _keeps_size(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) and module.stride == (1, 1)


def _with_batch(
    channels: int, sizes: tuple[int, ...], batch_size: int | None, device_type: str, layer: str
) -> tuple[int, ...]:
    if channels < 1:
        raise CommandError(
            f"The first layer, a {layer}, does not know its channels yet, so the input's shape cannot be "
            "inferred. Give it with --input, for example --input 64x3x32x32."
        )
    batch = BATCHES[len(sizes)]
    if device_type == "cpu" and sizes == SIZES[2]:
        batch = BATCH_OF_LARGE_IMAGES_ON_CPU
    return (batch_size or batch, channels, *sizes)

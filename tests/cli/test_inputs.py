import pytest
import torch
from memopt_cli.errors import CommandError
from memopt_cli.inputs import make_inputs
from torch import nn


def shapes(model: nn.Module, *given: str, batch_size: int | None = None, device: str = "cuda") -> list[tuple[int, ...]]:
    return [tuple(x.shape) for x in make_inputs(model, given, batch_size, torch.float32, device)]


@pytest.mark.parametrize(
    ("stem", "expected"),
    [
        (nn.Conv2d(3, 8, 3, padding=1), (64, 3, 32, 32)),
        (nn.Conv2d(1, 8, 3, stride=2), (64, 1, 224, 224)),
        (nn.Conv2d(5, 8, 7, stride=2), (64, 5, 224, 224)),
        (nn.Conv2d(4, 8, 1), (64, 4, 224, 224)),
        (nn.Conv1d(12, 8, 3), (16, 12, 1024)),
        (nn.Conv3d(1, 8, 3), (2, 1, 32, 32, 32)),
        (nn.Linear(7, 8), (64, 7)),
    ],
)
def test_shape_follows_from_the_first_layer(stem: nn.Module, expected: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.ReLU(), stem, nn.Conv2d(99, 1, 3), nn.Linear(99, 1))
    assert shapes(model) == [expected]
    assert shapes(model, batch_size=5) == [(5, *expected[1:])]


def test_large_images_come_in_smaller_batches_on_a_cpu() -> None:
    assert shapes(nn.Conv2d(3, 8, 7, stride=2), device="cpu") == [(8, 3, 224, 224)]
    assert shapes(nn.Conv2d(3, 8, 3), device="cpu") == [(64, 3, 32, 32)]


def test_given_shapes_are_taken() -> None:
    assert shapes(nn.ReLU(), "2x3x8x8") == [(2, 3, 8, 8)]
    assert shapes(nn.ReLU(), "2x3", "2", "2×6") == [(2, 3), (2,), (2, 6)]


def test_values_are_the_same_at_every_call_and_in_the_dtype() -> None:
    first, second = (make_inputs(nn.Linear(3, 3), (), None, torch.bfloat16, "cpu") for _ in range(2))
    assert first[0].dtype == torch.bfloat16
    assert torch.equal(first[0], second[0])
    assert first[0].std() > 0.5


@pytest.mark.parametrize("text", ["", "3x", "ax3", "3,3", "2x3x 8", "--1x2"])
def test_shapes_that_do_not_parse(text: str) -> None:
    with pytest.raises(CommandError, match=r"is not a shape. Write sizes joined by x, for example 64x3x32x32"):
        shapes(nn.Linear(3, 3), text)


@pytest.mark.parametrize("text", ["0x3x8x8", "3x-1", "0"])
def test_sizes_are_positive(text: str) -> None:
    with pytest.raises(CommandError, match=rf"^--input '{text}': sizes must be positive, for example 64x3x32x32\.$"):
        shapes(nn.Linear(3, 3), text)


def test_inputs_share_their_first_size() -> None:
    fact = r"^--input 4x3x8x8 and --input 3x1 differ in their first size, which is the batch\."
    with pytest.raises(CommandError, match=fact + r" Give every --input the same first size, or use memopt\.compare"):
        shapes(nn.ReLU(), "4x3x8x8", "4x2", "3x1")


def test_shapes_that_cannot_be_inferred() -> None:
    with pytest.raises(CommandError, match=r"ReLU has no convolution or linear layer .* --input 64x3x32x32"):
        shapes(nn.ReLU())
    with pytest.raises(CommandError, match=r"a LazyConv2d, does not know its channels yet.*--input"):
        shapes(nn.LazyConv2d(3, 3))


def test_a_batch_size_beside_a_shape_is_refused() -> None:
    with pytest.raises(CommandError, match="Leave --batch-size out"):
        shapes(nn.Linear(3, 3), "2x3", batch_size=4)

import copy
import itertools
import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

import memopt
from memopt.measure import Equivalence, StepError, check_equivalence


def twins(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    return model, copy.deepcopy(model)


def count_again(buffer: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: object, output: torch.Tensor) -> None:
        getattr(module, buffer).add_(1)

    return hook


def test_a_model_is_equivalent_to_its_copy(make_tiny, images) -> None:
    result = check_equivalence(*twins(make_tiny(drop_rate=0.3)), [images])
    assert result == Equivalence("exact", True, True, True, 0.0, True, (), 3)


def test_a_model_is_equivalent_to_itself_with_memopt(make_tiny, images) -> None:
    naive, rewritten = twins(make_tiny())
    result = check_equivalence(naive, memopt.apply(rewritten), [images])
    assert result.passed
    assert memopt.explain(rewritten).ran


def test_starts_both_from_the_naive_models_state(make_tiny, images) -> None:
    assert check_equivalence(make_tiny(), make_tiny(), [images]).passed


@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_sees_a_single_changed_bit_of_the_output(make_tiny, images, amp) -> None:
    naive, other = twins(make_tiny())

    def flip(module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        changed = output.clone()
        with torch.no_grad():
            changed[0, 0] = torch.nextafter(changed[0, 0].float(), torch.tensor(9.0)) if amp is None else 9.0
        return changed

    other.register_forward_hook(flip)
    result = check_equivalence(naive, other, [images], steps=1, amp=amp)
    assert (result.outputs_equal, result.passed) == (False, False)
    assert "output 0" in result.differing


def test_sees_a_gradient_that_differs_and_how_much(make_tiny, images) -> None:
    naive, other = twins(make_tiny())
    other.stem.weight.register_hook(lambda gradient: gradient * 1.25)
    result = check_equivalence(naive, other, [images], steps=1)
    assert (result.outputs_equal, result.gradients_equal, result.buffers_equal) == (True, False, True)
    assert result.differing == ("gradient of stem.weight", "stem.weight after the step")
    assert result.max_gradient_error == pytest.approx(0.25)
    assert not result.passed


def test_sees_a_gradient_that_is_missing(make_tiny, images) -> None:
    naive, other = twins(make_tiny())
    other.stem.bias.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    result = check_equivalence(naive, other, [images], steps=1)
    assert not result.gradients_equal
    assert result.max_gradient_error == math.inf


def test_sees_input_gradients_that_differ(make_tiny, images) -> None:
    class Halving(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient / 2

    naive, other = twins(make_tiny())
    other.register_forward_pre_hook(lambda module, args: (Halving.apply(args[0]),))
    assert check_equivalence(naive, other, [images], steps=1).passed
    result = check_equivalence(naive, other, [images], steps=2)
    assert result.differing == ("gradient of input 0",)
    assert not result.gradients_equal


def test_sees_a_buffer_updated_twice(make_tiny, images) -> None:
    naive, other = twins(make_tiny())
    other.norms[1].register_forward_hook(count_again("num_batches_tracked"))
    result = check_equivalence(naive, other, [images], steps=1)
    assert (result.outputs_equal, result.gradients_equal, result.buffers_equal) == (True, True, False)
    assert result.differing == ("buffer norms.1.num_batches_tracked",)


def test_sees_buffers_that_are_not_saved(images) -> None:
    class Counting(nn.Conv2d):
        def __init__(self) -> None:
            super().__init__(3, 2, 3)
            self.register_buffer("calls", torch.zeros(1), persistent=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return super().forward(x)

    naive, other = Counting(), Counting()
    other.calls += 7
    assert check_equivalence(naive, other, [images]).passed
    other.register_forward_hook(count_again("calls"))
    assert not check_equivalence(naive, other, [images]).buffers_equal


def test_sees_another_stream_of_random_numbers(make_tiny, images) -> None:
    naive, other = twins(make_tiny(drop_rate=0.5))
    other.register_full_backward_hook(lambda *_: torch.rand(1) and None)
    result = check_equivalence(naive, other, [images], steps=2)
    assert not result.passed


def test_batches_take_turns(make_tiny) -> None:
    seen: list[float] = []
    naive, other = twins(make_tiny())
    naive.register_forward_pre_hook(lambda module, args: seen.append(args[0][0, 0, 0, 0].item()))
    batches = [(torch.full((2, 3, 8, 8), float(i)),) for i in range(2)]
    check_equivalence(naive, other, batches)
    assert seen == [0.0, 1.0, 0.0]


def test_leaves_everything_as_it_was(make_tiny, images) -> None:
    naive, other = make_tiny(), make_tiny()
    naive(*images).sum().backward()
    before = [{name: t.clone() for name, t in model.state_dict().items()} for model in (naive, other)]
    gradient, random_state = naive.stem.weight.grad, torch.get_rng_state()
    kept = gradient.clone()
    check_equivalence(naive, other, [images])
    for model, state in zip((naive, other), before, strict=True):
        assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert naive.stem.weight.grad is gradient
    assert torch.equal(gradient, kept)
    assert other.stem.weight.grad is None
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not images[0].requires_grad


def test_takes_models_that_write_into_their_input(images) -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 2, 3))
    before = images[0].clone()
    assert check_equivalence(*twins(model), [images]).passed
    assert torch.equal(images[0], before)


def test_nan_equals_nan(make_tiny, images) -> None:
    broken = (images[0] * math.nan,)
    result = check_equivalence(*twins(make_tiny()), [broken], steps=1)
    assert (result.passed, result.max_gradient_error) == (True, 0.0)


def test_refuses_models_that_are_not_alike(make_tiny, images) -> None:
    with pytest.raises(ValueError, match=r"do not have the same parameters and buffers: .*Compare copies"):
        check_equivalence(make_tiny(), nn.Linear(2, 2), [images])


def test_refuses_models_with_nothing_to_train(make_tiny, images) -> None:
    with pytest.raises(StepError):
        check_equivalence(*twins(make_tiny().requires_grad_(False)), [images])


@pytest.fixture
def unrepeatable(make_tiny) -> Callable[..., nn.Module]:
    """A model, part of which comes out different at every run."""

    def make(part: str, warning: str | None = None) -> nn.Module:
        model, numbers = make_tiny(), itertools.count(1)

        def differ(gradient: torch.Tensor) -> torch.Tensor:
            if warning is not None:
                warnings.warn(warning, stacklevel=1)
            return gradient * (1 + next(numbers) / 8)

        def hook(module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
            if part == "outputs":
                return output * (1 + next(numbers) / 8)
            output.register_hook(differ)
            return output

        model.stem.register_forward_hook(hook)
        return model

    return make


POOLING = "adaptive_avg_pool2d_backward_cuda does not have a deterministic implementation, but you set"


def test_what_eager_does_not_repeat_is_skipped_but_fails(unrepeatable, images) -> None:
    result = check_equivalence(*twins(unrepeatable("gradients")), [images], steps=1, repeat_eager=True)
    assert "gradient of stem.weight" in result.skipped
    assert "gradient of classifier.weight" not in result.skipped
    assert result.differing == ()
    assert not result.passed


def test_gradients_behind_a_pooling_without_a_deterministic_backward_are_excused(unrepeatable, images) -> None:
    result = check_equivalence(*twins(unrepeatable("gradients", POOLING)), [images], repeat_eager=True)
    assert "gradient of stem.weight" in result.skipped
    assert result.passed


def test_what_is_repeated_must_still_be_equal(unrepeatable, images) -> None:
    naive, other = twins(unrepeatable("gradients", POOLING))
    other.classifier.weight.register_hook(lambda gradient: gradient * 1.5)
    result = check_equivalence(naive, other, [images], steps=1, repeat_eager=True)
    assert result.differing == ("gradient of classifier.weight", "classifier.weight after the step")
    assert result.max_gradient_error == pytest.approx(0.5)
    assert not result.passed


def test_outputs_that_eager_does_not_repeat_are_never_excused(unrepeatable, images) -> None:
    model = unrepeatable("outputs", POOLING)
    result = check_equivalence(*twins(model), [images], steps=1, repeat_eager=True)
    assert "output 0" in result.skipped
    assert not result.passed


@pytest.mark.gpu
def test_gpu_eager_is_repeated_first(make_tiny) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    batch = (torch.randn(4, 3, 8, 8, device=device),)
    result = check_equivalence(*twins(make_tiny(drop_rate=0.3).to(device)), [batch])
    assert (result.passed, result.skipped) == (True, ())

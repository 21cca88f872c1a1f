"""On a GPU: the exact runtime equals eager bit for bit, in every mode that chooses other kernels."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import memopt
from densenet_models import bc, growing, plain, signal, volumetric
from memopt.measure.equivalence import check_equivalence

pytestmark = pytest.mark.gpu

CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "bc": (lambda: bc.DenseNet(depth=22, drop_rate=0.2), (8, 3, 32, 32)),
    "bc-imagenet": (
        lambda: bc.DenseNet(block_config=(2, 3), growth_rate=8, small_inputs=False),
        (4, 3, 64, 64),
    ),
    "growing": (lambda: growing.DenseNet(depth=22, growth_rate=8), (8, 3, 32, 32)),
    "prepended": (lambda: growing.DenseNet(depth=22, growth_rate=8, prepend=True), (8, 3, 32, 32)),
    "plain": (lambda: plain.DenseNet(depth=13, growth_rate=8, drop_rate=0.1), (8, 3, 32, 32)),
    "volumetric": (volumetric.DenseNet, (2, 1, 16, 16, 16)),
    "signal": (signal.DenseNet, (4, 12, 256)),
}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("amp", [None, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("level", ["concat", "layer"])
@pytest.mark.parametrize("case", CASES)
def test_equals_eager_bit_for_bit(case: str, level: str, train: bool, amp: torch.dtype | None, layout: str) -> None:
    make, shape = CASES[case]
    memory_format = LAYOUTS[layout]
    if layout == "channels_last" and len(shape) != 4:
        pytest.skip("channels_last is a layout of images")
    torch.manual_seed(0)
    naive = make().cuda().to(memory_format=memory_format).train(train)
    rewritten = memopt.apply(copy.deepcopy(naive), config=memopt.Config(numerics="exact", recompute=level))
    batches = [(torch.randn(shape, device="cuda").contiguous(memory_format=memory_format),) for _ in range(3)]

    result = check_equivalence(naive, rewritten, batches, steps=3, amp=amp)

    explanation = memopt.explain(rewritten)
    assert explanation.ran
    assert len(explanation.rewritten) == len(explanation.chains) > 0
    assert result.skipped == ()
    assert result.passed, result.differing


def test_default_model_is_exact_at_full_size() -> None:
    naive = bc.DenseNet().cuda()
    rewritten = memopt.apply(copy.deepcopy(naive), config=memopt.Config(numerics="exact"))
    batches = [(torch.randn(64, 3, 32, 32, device="cuda"),) for _ in range(3)]

    result = check_equivalence(naive, rewritten, batches, steps=3)

    assert len(memopt.explain(rewritten).rewritten) == 51
    assert result.passed, result.differing

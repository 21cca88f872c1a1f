"""Average poolings whose windows lie side by side."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from memopt.find.pooling import called_pool, module_pool


@pytest.mark.parametrize(
    ("module", "window"),
    [
        (nn.AvgPool2d(2), (2, 2)),
        (nn.AvgPool2d((2, 3), stride=(2, 3), ceil_mode=True, count_include_pad=False), (2, 3)),
        (nn.AvgPool1d(4), (4,)),
        (nn.AvgPool3d(2, stride=2), (2, 2, 2)),
        (nn.AvgPool2d(3, stride=2), None),
        (nn.AvgPool2d(2, padding=1), None),
        (nn.AvgPool2d(2, divisor_override=4), None),
        (nn.MaxPool2d(2), None),
    ],
    ids=str,
)
def test_modules(module: nn.Module, window: tuple[int, ...] | None) -> None:
    assert module_pool(module) == window


@pytest.mark.parametrize(
    ("target", "args", "kwargs", "window"),
    [
        (F.avg_pool2d, (2,), {}, (2, 2)),
        (F.avg_pool2d, ([3], None), {"padding": [0, 0]}, (3, 3)),
        (F.avg_pool1d, (), {"kernel_size": (2,), "stride": (2,)}, (2,)),
        (torch.avg_pool1d, (2, 1), {}, None),
        (F.avg_pool3d, (2,), {"stride": (2, 2, 1)}, None),
        (F.avg_pool2d, (2,), {"divisor_override": 3}, None),
        (F.max_pool2d, (2,), {}, None),
    ],
    ids=["2d", "lists", "keywords", "overlapping", "one-stride-differs", "divisor", "maximum"],
)
def test_calls(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], window: tuple[int, ...] | None) -> None:
    assert called_pool(target, args, kwargs) == window

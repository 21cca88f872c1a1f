"""Random numbers that do not depend on the dtype they are drawn for, and whether any were."""

import pytest
import torch
import torch.nn.functional as F

from memopt.measure.draws import SameDraws


@pytest.mark.parametrize("dropout", [F.dropout, F.dropout2d, F.alpha_dropout])
def test_masks_are_the_same_in_float64(dropout) -> None:
    dropped = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        with SameDraws() as draws:
            dropped.append(dropout(torch.ones(4, 8, 5, 5, dtype=dtype), training=True) <= 0)
        assert draws.any
    assert torch.equal(*dropped)
    assert dropped[0].any()


@pytest.mark.parametrize("draw", [torch.rand, torch.randn, torch.randperm])
def test_any_draw_is_noticed(draw) -> None:
    with SameDraws() as draws:
        torch.ones(3) + 1
        assert not draws.any
        draw(3)
    assert draws.any

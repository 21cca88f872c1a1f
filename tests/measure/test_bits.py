import math

import pytest
import torch

from memopt.measure.bits import relative_error, same_bits

NAN = torch.tensor(math.nan)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (torch.tensor([1.0]), torch.tensor([1.0]), True),
        (NAN, NAN.clone(), True),
        (torch.tensor(0.0), torch.tensor(-0.0), False),
        (torch.ones(2, 3).t(), torch.ones(3, 2), True),
        (torch.ones(2, 3), torch.ones(3, 2), False),
        (torch.ones(2), torch.ones(2).double(), False),
        (torch.ones(2), torch.ones(2).view(torch.int32), False),
        (torch.tensor([True]), torch.tensor([True]), True),
        (torch.ones(3, dtype=torch.bfloat16), torch.ones(3, dtype=torch.bfloat16), True),
        (torch.empty(0), torch.empty(0), True),
        (torch.eye(3).to_sparse(), torch.eye(3).to_sparse(), True),
        (None, None, True),
        (None, torch.ones(1), False),
    ],
)
def test_same_bits(first: torch.Tensor | None, second: torch.Tensor | None, expected: bool) -> None:
    assert same_bits(first, second) is expected


@pytest.mark.parametrize(
    ("reference", "candidate", "expected"),
    [
        (torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.0]), 0.0),
        (torch.tensor([3.0, 4.0]), torch.tensor([3.0, 5.0]), 0.2),
        (NAN, NAN.clone(), 0.0),
        (torch.zeros(2), torch.ones(2), math.inf),
        (torch.ones(2), torch.tensor([1.0, math.nan]), math.inf),
        (torch.ones(2), torch.ones(3), math.inf),
        (torch.ones(2), None, math.inf),
        (None, None, 0.0),
    ],
)
def test_relative_error(reference: torch.Tensor | None, candidate: torch.Tensor | None, expected: float) -> None:
    assert relative_error(reference, candidate) == pytest.approx(expected)

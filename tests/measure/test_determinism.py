import warnings

import pytest
import torch

from memopt.measure.determinism import deterministic


def algorithms() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def fail_inside() -> None:
    with deterministic():
        assert torch.backends.cudnn.deterministic
        assert not torch.backends.cudnn.benchmark
        assert algorithms() == (True, True)
        raise KeyError


@pytest.mark.parametrize("before", [(False, False), (True, False), (True, True)])
def test_settings_hold_inside_and_are_put_back(before: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    try:
        with pytest.raises(KeyError):
            fail_inside()
        assert not torch.backends.cudnn.deterministic
        assert algorithms() == before
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("adaptive_avg_pool2d_backward_cuda does not have a deterministic implementation, but you set", True),
        ("max_pool3d_with_indices_backward_cuda does not have a deterministic implementation, but", True),
        ("cumsum_cuda_kernel does not have a deterministic implementation, but you set", False),
        ("adaptive_avg_pool2d_backward_cuda is deprecated", False),
    ],
)
def test_knows_whether_a_pooling_without_a_deterministic_backward_ran(message: str, expected: bool) -> None:
    with deterministic() as seen:
        warnings.warn(message, stacklevel=1)
    assert seen.pooling_ran is expected

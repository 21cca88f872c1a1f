import pytest
from memopt_cli.train.batch_size import PRECISION, largest_batch, predicted_peak

import memopt
from densenet_models import bc


def largest(peaks: object, free: int, most: int, multiple: int = 1) -> tuple[int | None, int]:
    asked: list[int] = []

    def peak_bytes(batch: int) -> int:
        asked.append(batch)
        return peaks(batch)  # type: ignore[operator, no-any-return]

    found = largest_batch(peak_bytes, free, most, multiple)
    assert all(batch % multiple == 0 and 0 < batch <= most for batch in asked)
    return found, len(asked)


@pytest.mark.parametrize("free", [105, 999, 5_432, 100_000])
@pytest.mark.parametrize("multiple", [1, 4])
def test_a_linear_peak_is_found_in_few_steps(free: int, multiple: int) -> None:
    found, steps = largest(lambda batch: 100 + batch, free, 4000, multiple)
    best = min(free - 100, 4000) // multiple * multiple
    assert (found or 0) <= best
    assert (found or 0) >= best - max(multiple, PRECISION * best)
    assert steps <= 8


def test_a_peak_that_bends_is_found_too() -> None:
    found, steps = largest(lambda batch: 100 + batch**2, 100 + 500**2, 4000)
    assert found is not None
    assert 490 <= found <= 500
    assert steps <= 14


def test_nothing_fits() -> None:
    assert largest(lambda batch: 100 + batch, 50, 4000)[0] is None


def test_no_more_than_there_are_images() -> None:
    assert largest(lambda batch: batch, 10**9, 1350)[0] == 1350
    assert largest(lambda batch: batch, 10**9, 1350, 4)[0] == 1348


def test_prediction_knows_memopt() -> None:
    def make() -> bc.DenseNet:
        return bc.DenseNet(depth=40)

    shape = (3, 32, 32)
    naive = predicted_peak(make, shape, "cuda", None, None)
    exact = predicted_peak(make, shape, "cuda", None, memopt.Config(numerics="exact"))
    auto = predicted_peak(make, shape, "cuda", None, memopt.Config())
    assert naive(8) > exact(8) > auto(8)
    # Beside what does not depend on the batch: parameters, cuBLAS's workspaces.
    assert naive(32) - naive(16) > 1.9 * (naive(16) - naive(8)) > 0

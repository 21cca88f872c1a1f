import math

import pytest

from memopt.measure.scaling import fitted_exponent, largest_fitting


@pytest.mark.parametrize("power", [1.0, 1.7, 2.0])
@pytest.mark.parametrize("limit", [9.0, 10.0, 555.0, 1e6])
@pytest.mark.parametrize("start", [1, 7, 5000])
def test_the_largest_that_fits_is_found_in_few_tries(power: float, limit: float, start: int) -> None:
    tried: list[int] = []

    def cost(x: int) -> float:
        tried.append(x)
        return 3 + x**power

    found = largest_fitting(cost, limit, start)
    assert found is not None
    assert cost(found) <= limit < cost(found + 1)
    assert len(set(tried)) == len(tried) - 2  # the two calls above were among them
    assert len(tried) <= 26


def test_memory_over_batch_size_takes_few_predictions() -> None:
    tried: list[int] = []

    def cost(x: int) -> float:
        tried.append(x)
        return 100 + 37 * x + 3 * (x % 5)

    assert largest_fitting(cost, 10_000, 64) == 267
    assert len(tried) <= 6


def test_a_cost_that_hardly_grows() -> None:
    tried: list[int] = []

    def cost(x: int) -> float:
        tried.append(x)
        return 1e8 + x

    assert largest_fitting(cost, 1.5e8, 64) == 50_000_000
    assert len(tried) <= 30


def test_a_tolerance_saves_tries() -> None:
    tried: list[int] = []

    def cost(x: int) -> float:
        tried.append(x)
        return float(x**2)

    found = largest_fitting(cost, 1e6, 10, tolerance=0.02)
    assert found is not None
    assert 980 <= found <= 1000
    assert len(tried) <= 9


def test_nothing_fits() -> None:
    assert largest_fitting(lambda x: 10.0 * x, 5.0, 64) is None


def test_the_exponent_of_a_power_law_and_its_error() -> None:
    exact = fitted_exponent([(x, 5 * x**1.5) for x in (40, 100, 196, 400)])
    assert exact is not None
    assert (exact.value, exact.error) == (pytest.approx(1.5), pytest.approx(0, abs=1e-6))
    bent = fitted_exponent([(1, 1), (10, 10), (100, 1000)])
    assert bent is not None
    # By hand: slopes of the logs 0, 1, 3 over 0, 1, 2; residuals 1/6, −1/3, 1/6.
    assert bent.value == pytest.approx(1.5)
    assert bent.error == pytest.approx(math.sqrt((1 / 36 + 1 / 9 + 1 / 36) / 1 / 2))
    assert str(bent) == "1.50 ± 0.29"
    two = fitted_exponent([(1, 1), (2, 4)])
    assert str(two) == "2.00"
    assert fitted_exponent([(1, 1), (1, 2)]) is None

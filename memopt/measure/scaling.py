"""How memory grows: the largest size that fits, and the exponent of growth."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# Never try a size more than this many times the largest that is known to fit: the next guess is better.
GROWTH = 4.0


def largest_fitting(
    cost: Callable[[int], float], limit: float, start: int, tolerance: float = 0.0, most: int | None = None
) -> int | None:
    """The largest whole number x ≥ 1 with cost(x) ≤ limit, for a cost that grows with x; None if not even 1 fits.

    Guesses by drawing a straight line through what is known, which is exact for memory over batch size, and a power,
    which is nearly so over depth.

    Args:
        cost: expensive; called once for each x.
        limit: of the cost.
        start: the first guess.
        tolerance: share of x by which the result may be too small.
        most: no larger x is wanted.
    """
    costs: dict[int, float] = {}

    def fits(x: int) -> bool:
        costs[x] = cost(x)
        return costs[x] <= limit

    low, high = 0, 0
    guess = max(start, 1)
    while True:
        guess = guess if most is None else min(guess, most)
        if fits(guess):
            low = guess
        else:
            high = guess
        if low == most or (high and (high - low == 1 or high - low <= tolerance * low)):
            return low or None
        guess = _next(costs, limit, low, high)


def _next(costs: dict[int, float], limit: float, low: int, high: int) -> int:
    """A number to try: above `low`, which fits (0: nothing is known to), and below `high`, which does not (0: none)."""
    if not low:
        return high // 2
    others = [x for x in costs if x != low]
    nearest = high or max(others, default=0)
    if nearest and costs[nearest] != costs[low]:
        # Memory over a depth is steeper the deeper: a straight line leads far beyond, where a prediction takes minutes.
        guesses = [lead(low, costs[low], nearest, costs[nearest], limit) for lead in (_straight, _as_a_power)]
        guess = max(guesses) if high else min(guesses)
    else:
        guess = 2 * low
    if high:
        margin = max(1, (high - low) // 8)
        return min(max(guess, low + margin), high - margin)
    # Past the guess by a little: the answer is then enclosed.
    return min(max(guess + 1, low + 1), int(GROWTH * low) + 1)


def _straight(x: int, cost: float, other: int, other_cost: float, limit: float) -> int:
    """Where a straight line through two points reaches the limit."""
    return x + int((limit - cost) * (other - x) / (other_cost - cost))


def _as_a_power(x: int, cost: float, other: int, other_cost: float, limit: float) -> int:
    """Where the power of x that goes through two points reaches the limit; else where a straight line does."""
    if min(cost, other_cost, limit) <= 0:
        return _straight(x, cost, other, other_cost, limit)
    exponent = math.log(other_cost / cost) / math.log(other / x)
    # Of a model that hardly grows the exponent is next to nothing, and the power beyond all numbers.
    return int(x * math.exp(min(math.log(limit / cost) / exponent, math.log(GROWTH)))) if exponent > 0 else x


@dataclass(frozen=True, slots=True)
class Exponent:
    """y grows like x to the power of `value`, within `error` (one standard error of the fit; nan from two points)."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.2f}" + ("" if math.isnan(self.error) else f" ± {self.error:.2f}")


def fitted_exponent(points: Sequence[tuple[float, float]]) -> Exponent | None:
    """Slope of a straight line through log y over log x, by least squares.

    Args:
        points: (x, y), both above 0.

    Returns:
        None for fewer than two different x.
    """
    logs = [(math.log(x), math.log(y)) for x, y in points]
    count = len(logs)
    if len({x for x, _ in logs}) < 2:
        return None
    mean_x, mean_y = (sum(values) / count for values in zip(*logs, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in logs)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in logs) / spread
    if count == 2:
        return Exponent(slope, math.nan)
    left = sum((y - mean_y - slope * (x - mean_x)) ** 2 for x, y in logs)
    return Exponent(slope, math.sqrt(left / (count - 2) / spread))

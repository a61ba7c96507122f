"""Finds the width at which a net costs as much as another one, by counting nets."""

import math
from collections.abc import Callable

MAX_REFUSED = 200  # widths without a net, before the search ends


def solve(
    count: Callable[[int], int], target: int, start: int = 1, tolerance: float = 0.02
) -> int:
    """Returns the width (a positive integer) whose count is nearest to `target`.

    count: returns the count at a width, which must increase with the width, and raises
      ValueError if no net has this width (groups that do not divide it, for example).
    start: the width to begin at; only affects the number of counts.
    tolerance: largest |count - target| / target.
    Raises ValueError, which names the nearest widths, if none is within the tolerance.
    """
    known, refused, reason = {}, set(), ""
    low, high, guess = 0, math.inf, start  # count(low) <= target < count(high)
    while (width := _nearest(guess, low, high, refused)) is not None:
        try:
            known[width] = count(width)
        except ValueError as error:
            refused.add(width)
            reason = str(error)
            if len(refused) > MAX_REFUSED:
                break
            continue
        if known[width] <= target:
            low = width
        else:
            high = width
        # Counts grow between linearly and quadratically.
        guess = round(width * math.sqrt(target / max(known[width], 1)))
    if not known:
        raise ValueError(f"no width near {start} has a net: {reason}")
    best = min(known, key=lambda width: abs(known[width] - target))
    if abs(known[best] - target) > tolerance * target:
        ends = (
            f"{width} ({known[width]:,}, {known[width] / target - 1:+.1%})"
            for width in (low, high)
            if width in known
        )
        raise ValueError(
            f"no width is within {tolerance:.0%} of {target:,}; the nearest are "
            f"{' and '.join(ends)}"
        )
    return best


def _nearest(guess: int, low: int, high: float, refused: set[int]) -> int | None:
    """Returns the width nearest to `guess` inside (low, high) that is not refused."""
    guess = int(min(max(guess, low + 1), high - 1))
    for distance in range(MAX_REFUSED + 1):
        for width in (guess - distance, guess + distance):
            if low < width < high and width not in refused:
                return width
    return None

"""The search for the width of a given price, on counts known in closed form."""

import math

import pytest

from analysis.equal_price import solve


@pytest.mark.parametrize("start", [1, 10, 400])
@pytest.mark.parametrize("power", [1, 1.5, 2])
def test_the_nearest_width_is_found(start, power):
    count = lambda width: 7 * math.floor(width**power) + 3
    target = 7 * 1234
    nearest = min(range(1, 2000), key=lambda width: abs(count(width) - target))
    assert solve(count, target, start, tolerance=1.0) == nearest


def test_few_nets_are_counted():
    counted = []

    def count(width):
        counted.append(width)
        return 9 * width**2 + 100 * width

    solve(count, count(371), start=24, tolerance=0.02)
    assert len(counted) < 12


def test_widths_without_a_net_are_skipped():
    def count(width):
        if width % 12:
            raise ValueError(f"12 groups do not divide {width} channels")
        return width**2

    assert solve(count, 60**2 + 5, start=31) == 60


def test_an_unreachable_price_names_the_nearest_widths():
    with pytest.raises(
        ValueError, match=r"within 2% of 110.* 10 \(100, -9.1%\) and 11"
    ):
        solve(lambda width: width**2, 110, start=3)
    with pytest.raises(ValueError, match=r"nearest are 1 \(50, \+400.0%\)$"):
        solve(lambda width: 50 * width, 10)


def test_a_net_that_no_width_builds_reports_the_reason():
    def count(width):
        raise ValueError("no stage")

    with pytest.raises(ValueError, match="no width near 8 has a net: no stage"):
        solve(count, 100, start=8)

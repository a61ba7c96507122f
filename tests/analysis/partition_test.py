"""The planner's arithmetic against the nets themselves and against the theory."""

import math

import pytest
from flax import nnx

import nets
from analysis.partition import best_partitions, plan, table
from nets import cost


def counted(primary, secondary, *, blocks, num_classes=10, grow="M"):
    """Parameters and multiply-accumulates of the net itself."""
    groups = dict(primary_groups=primary)
    if grow == "L":
        groups = dict(primary_groups=0, secondary_groups=secondary)
    wiring = dict(kind="interleaved", **groups)
    net = dict(name="plain", wiring=wiring, num_classes=num_classes)
    net |= dict(depth=3 * blocks + 2, width=primary * secondary)
    built = nnx.eval_shape(lambda: nets.create(net, nnx.Rngs(0)))
    total = cost.total(cost.layers(built, (1, 32, 32, 3)))
    return total.parameters, total.macs


@pytest.mark.parametrize(
    ("partitions", "options"),
    [
        ((24, 2), dict(blocks=2)),
        ((4, 8), dict(blocks=1, num_classes=100)),
        ((6, 4), dict(blocks=2, grow="L")),
        ((5, 1), dict(blocks=1)),
    ],
)
def test_counts_are_those_of_the_net(partitions, options):
    found = plan(*partitions, **options)
    assert (found.parameters, found.macs) == counted(*partitions, **options)


def test_the_best_within_the_budgets_of_regular_nets():
    """RegConv-W16 and -W18 of depth 20; figures of the specification."""
    best = best_partitions(269_722, min_secondary=1)
    found = [(p.primary, p.secondary, p.width, p.parameters) for p in best]
    assert found[0] == (35, 2, 70, 259_780)
    assert {row[:3] for row in found[:3]} == {(35, 2, 70), (34, 2, 68), (67, 1, 67)}
    first = best_partitions(341_020)[0]
    assert (first.primary, first.secondary, first.parameters) == (42, 2, 336_430)


@pytest.mark.parametrize("count", ["parameters", "macs"])
@pytest.mark.parametrize("grow", ["M", "L"])
def test_nothing_within_the_budget_is_missed(count, grow):
    budget = {"parameters": 60_000, "macs": 9e6}[count]
    options = dict(blocks=2, grow=grow)
    found = best_partitions(budget, count=count, **options)
    expected = set()
    for primary in range(1, 150):
        for secondary in range(2, 150):
            if grow == "L" and secondary % 2:
                continue  # a widening block would have half a channel a partition
            if getattr(plan(primary, secondary, **options), count) <= budget:
                expected.add((primary, secondary))
    assert {(p.primary, p.secondary) for p in found} == expected
    widths = [p.width for p in found]
    assert widths == sorted(widths, reverse=True)


def test_balanced_pairs_are_widest_for_their_weights():
    """L = k^2 M: 1,296 weights make 36 channels in pairs and 12 in a regular layer."""
    balanced = plan(18, 2)
    assert balanced.block_weights == 1296
    assert (balanced.width, balanced.regular_width) == (36, 12)
    assert balanced.balance == (1, 0.5, 0.25)
    for primary in range(1, 200):
        for secondary in range(1, 20):
            other = plan(primary, secondary)
            if other.block_weights <= 1296:
                assert other.width <= 36
            # At equal weights, half the harmonic mean of L and k^2 M.
            ratio = primary * 9 * secondary / (primary + 9 * secondary)
            assert math.isclose((other.width / other.regular_width) ** 2, ratio)


def test_growing_partitions_doubles_the_balance():
    assert plan(18, 2, grow="L").balance == (1, 2, 4)


def test_balance_ranks_the_widest_of_each_size_of_partition():
    plans = best_partitions(269_722, objective="balance")
    assert [p.imbalance for p in plans] == sorted(p.imbalance for p in plans)
    assert len({p.secondary for p in plans}) == len(plans)
    assert plans[0].width == 70


def test_what_is_unknown_or_impossible_is_refused():
    with pytest.raises(ValueError, match=r"count 'flops': choose from .*'macs'"):
        best_partitions(1e5, count="flops")
    with pytest.raises(ValueError, match="grow 'N'"):
        best_partitions(1e5, grow="N")
    with pytest.raises(ValueError, match="10 partitions do not divide 15 channels"):
        plan(5, 3, grow="L")
    for wrong in (dict(budget=1e5, min_secondary=0), dict(budget=math.inf)):
        with pytest.raises(ValueError, match=r"at least 1, .*finite"):
            best_partitions(**wrong)
    assert best_partitions(10) == []


def test_the_table_shows_every_plan():
    lines = table(best_partitions(269_722)[:3]).splitlines()
    assert len(lines) == 4
    assert "259,780" in lines[1]

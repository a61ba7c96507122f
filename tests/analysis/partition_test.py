"""The planner's counts against the nets themselves, its choices against the theory."""

import math

import pytest

from analysis.partition import best_partitions, plan, table
from nets import cost


@pytest.mark.parametrize(
    ("partitions", "options"),
    [
        ((24, 2), dict(depth=8)),
        ((3, 8), dict(depth=5, num_classes=100)),
        ((6, 6), dict(depth=8, grow="L")),
        ((5, 1), dict(depth=5)),
    ],
)
def test_counts_equal_the_net(partitions, options):
    primary, secondary = partitions
    groups = dict(primary_groups=primary)
    if options.get("grow") == "L":
        groups = dict(primary_groups=0, secondary_groups=secondary)
    net = dict(name="plain", width=primary * secondary, depth=options["depth"])
    net |= dict(num_classes=options.get("num_classes", 10))
    net |= dict(wiring=dict(kind="interleaved") | groups)
    total = cost.total(cost.of(net, (32, 32, 3)))
    found = plan(primary, secondary, **options)
    assert (found.parameters, found.macs) == (total.parameters, total.macs)


def test_best_nets_within_the_budgets_of_regular_nets():
    """Budgets of RegConv-W16 and -W18 with depth 20."""
    best = best_partitions(269_722, min_secondary=1)
    found = [(p.primary, p.secondary, p.width, p.parameters) for p in best]
    assert found[0] == (35, 2, 70, 259_780)
    assert {row[:3] for row in found[:3]} == {(35, 2, 70), (34, 2, 68), (67, 1, 67)}
    first = best_partitions(341_020)[0]
    assert (first.primary, first.secondary, first.parameters) == (42, 2, 336_430)


@pytest.mark.parametrize("count", ["parameters", "macs"])
@pytest.mark.parametrize("grow", ["M", "L"])
def test_search_finds_every_net_within_the_budget(count, grow):
    budget = {"parameters": 60_000, "macs": 9e6}[count]
    options = dict(depth=8, grow=grow)
    found = best_partitions(budget, count=count, **options)
    expected = {
        (primary, secondary)
        for primary in range(1, 150)
        # If L grows, a block that widens cannot halve an odd M.
        for secondary in range(2, 150, 2 if grow == "L" else 1)
        if getattr(plan(primary, secondary, **options), count) <= budget
    }
    assert {(p.primary, p.secondary) for p in found} == expected
    widths = [p.width for p in found]
    assert widths == sorted(widths, reverse=True)


def test_balanced_pairs_are_widest_for_their_weights():
    """L = 9 M: 1,296 weights make 36 channels in pairs and 12 in a regular layer."""
    balanced = plan(18, 2)
    assert balanced.block_weights == 1296
    assert (balanced.width, balanced.regular_width) == (36, 12)
    assert balanced.balance == (1, 0.5, 0.25)
    for primary in range(1, 200):
        for secondary in range(1, 20):
            other = plan(primary, secondary)
            if other.block_weights <= 1296:
                assert other.width <= 36
            # At equal weights, half the harmonic mean of L and 9 M.
            ratio = primary * 9 * secondary / (primary + 9 * secondary)
            assert math.isclose((other.width / other.regular_width) ** 2, ratio)


def test_balance_doubles_with_each_stage_if_the_partitions_do():
    assert plan(18, 2, grow="L").balance == (1, 2, 4)


def test_balance_ranks_the_widest_net_of_each_partition_size():
    plans = best_partitions(269_722, objective="balance")
    assert [p.imbalance for p in plans] == sorted(p.imbalance for p in plans)
    assert len({p.secondary for p in plans}) == len(plans)
    assert plans[0].width == 70


def test_impossible_options_are_rejected():
    with pytest.raises(ValueError, match="10 partitions do not divide 15 channels"):
        plan(5, 3, grow="L")
    with pytest.raises(ValueError, match=r"depth 3 n \+ 2.*9"):
        best_partitions(1e5, depth=9)
    for wrong in (dict(budget=1e5, min_secondary=0), dict(budget=math.inf)):
        with pytest.raises(ValueError, match=r"at least 1 .*finite"):
            best_partitions(**wrong)
    assert best_partitions(10) == []


def test_table_has_one_line_per_plan():
    lines = table(best_partitions(269_722)[:3]).splitlines()
    assert len(lines) == 4
    assert "259,780" in lines[1]

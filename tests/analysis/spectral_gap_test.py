"""Rank correlations of gap and error, on constructed runs with known ranks."""

import csv
import math

import numpy as np
import pytest

from analysis import graphs, spectral_gap
from analysis.spectral_gap import Row, correlate, measure, report, within_nets
from configs import igcnets
from input_pipeline import Facts
from nets import ramanujan
from nets.connectivity import to_matrix
from runtime.workdir import save_config


def make_net(**wiring):
    config = igcnets.get_config("plain-8-W16")
    config.net.update(depth=5, width=4)
    config.net.wiring.update(kind="expander", compress=2, **wiring)
    return config


def test_rho_and_interval_of_known_ranks():
    # One swap of neighbours: 1 - 6 * 2 / (5 * 24) = 0.9.
    rho, low, high = correlate([1, 2, 3, 4, 5], [10, 20, 40, 30, 99])
    assert rho == pytest.approx(0.9)
    half = 1.959964 * math.sqrt((1 + 0.81 / 2) / 2)
    assert math.atanh(low) == pytest.approx(math.atanh(0.9) - half, abs=1e-5)
    assert math.atanh(high) == pytest.approx(math.atanh(0.9) + half, abs=1e-5)


def test_a_monotone_relation_has_rho_of_one():
    gaps = [0.1, 0.2, 0.3, 0.4, 0.5]
    assert correlate(gaps, np.exp(gaps)) == (1, 1, 1)
    assert correlate(gaps, [-x for x in gaps]) == (-1, -1, -1)


def test_ties_get_average_ranks():
    # Ranks 1.5, 1.5, 3, 4, 5 against 1 to 5: Pearson's 9.5 / sqrt(9.5 * 10).
    rho, _, _ = correlate([7, 7, 8, 9, 10], [1, 2, 3, 4, 5])
    assert rho == pytest.approx(math.sqrt(0.95))


@pytest.mark.parametrize(
    ("gaps", "errors", "groups", "message"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], 1, "needs 5 runs, got 4"),
        ([1, 2, 3, 4, 5], [1, 2, 3, 4, 6], 2, "needs 5 runs, got 4"),
        ([1] * 5, [1, 2, 3, 4, 5], 1, "all gaps are equal"),
        ([1, 2, 3, 4, 5], [1] * 5, 1, "all errors are equal"),
    ],
)
def test_correlations_that_say_nothing_are_refused(gaps, errors, groups, message):
    with pytest.raises(ValueError, match=message):
        correlate(gaps, errors, groups)


def test_means_of_nets_are_removed():
    """Between nets, gap and error rise together; within each, they oppose."""
    rows = [
        Row(net, seed, 0.5, base + seed / 100, 10 * base - seed)
        for net, base in (("a", 1), ("b", 2))
        for seed in range(3)
    ]
    rows += [Row("fixed", seed, 0.5, 0.3, 50.0 + seed) for seed in range(3)]
    gaps, errors, count = within_nets(rows)
    assert (len(gaps), count) == (6, 2)
    assert correlate(gaps, errors, count)[0] == pytest.approx(-1)
    assert correlate([x.gap for x in rows[:6]], [x.error for x in rows[:6]])[0] > 0


def test_the_report_has_a_line_for_each_density_with_enough_runs():
    rows = [Row("a", i, 0.5, 0.1 * i, 9.0 - i) for i in range(5)]
    assert "of density" not in report(rows)
    text = report([*rows, Row("b", 0, 0.25, 0.9, 1.0)])
    assert "| of density 0.5000 | 5 | -1.00 (no interval) |" in text
    assert "of density 0.2500" not in text
    assert "| within nets | 5 | -1.00 (no interval) |" in text
    with pytest.raises(ValueError, match=r"at least 5 finished runs .* got 4"):
        report(rows[1:])


def test_a_net_has_the_mean_gap_of_its_expander_layers():
    expected = []
    for ends in ((4, 4), (4, 8), (8, 16)):  # the three stages; the stem is dense
        edges = ramanujan.connect(*ends, ends[0] // 2)
        expected.append(1 - graphs.measure(to_matrix(edges, *ends)).second)
    density, gap = measure(make_net(sampling="ramanujan").net)
    assert density == 0.5
    assert gap == pytest.approx(np.mean(expected))
    config = make_net()
    config.net.wiring.kind = "dense"
    assert measure(config.net) is None


def test_the_gap_follows_the_graph_seed():
    found = []
    for seed in (0, 1, 1):
        config = make_net(sampling="per_output")
        config.net.graph_seed = seed
        found.append(measure(config.net)[1])
    assert found[0] != found[1] == found[2]


def test_finished_runs_of_a_study_are_read(tmp_path):
    with pytest.raises(ValueError, match=r"study.csv does not exist: WORKDIR must be"):
        spectral_gap.read(tmp_path)
    facts, lines = Facts(("a",), (32, 32, 3), (0.0,) * 3, (1.0,) * 3, 9), []
    for seed, finished in ((0, True), (1, False)):
        config = make_net(sampling="ramanujan")
        folder = tmp_path / "plain-x-4" / f"seed{seed}"
        save_config(folder, config, facts)
        error = 42.5 if finished else ""
        line = dict(run="plain-x-4", seed=seed, finished=finished, final_error=error)
        lines.append(line)
    with (tmp_path / "study.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, lines[0])
        writer.writeheader()
        writer.writerows(lines)
    [row] = spectral_gap.read(tmp_path)
    assert (row.net, row.seed, row.error) == ("plain-x-4", 0, 42.5)

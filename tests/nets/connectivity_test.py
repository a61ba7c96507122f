"""Graphs between channels: degrees, errors, and recorded graphs of the originals."""

import json
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nets import connectivity
from tests.support.golden_files import generator

RULES = ("smaller_side", "per_output", "per_input")
SIDES = st.integers(1, 24)


def draw(in_channels, out_channels, degree, sampling, seed=0):
    rng = np.random.default_rng(seed)
    edges = connectivity.draw_expander(in_channels, out_channels, degree, sampling, rng)
    return edges, connectivity.to_matrix(edges, in_channels, out_channels)


@settings(max_examples=60, deadline=None)
@given(SIDES, SIDES, st.sampled_from(RULES), st.data())
def test_degree_is_exact_on_the_sampled_side(inputs, outputs, sampling, data):
    side = connectivity.sampled_side(inputs, outputs, sampling)
    partners = {"input": outputs, "output": inputs}[side]
    degree = data.draw(st.integers(1, partners))
    edges, mask = draw(inputs, outputs, degree, sampling)
    axis = {"input": 1, "output": 0}[side]
    assert (mask.sum(axis) == degree).all()
    assert edges.dtype == np.int32
    assert (np.diff(edges) > 0).all()  # sorted, no connection twice
    assert len(edges) == connectivity.num_edges(inputs, outputs, degree, sampling)
    assert mask.sum() == len(edges)


@pytest.mark.parametrize(
    ("inputs", "outputs", "expected"),
    [
        (3, 2, ("output", "output", "input")),
        (2, 3, ("input", "output", "input")),
        (3, 3, ("input", "output", "input")),
    ],
)
def test_sampled_side(inputs, outputs, expected):
    sides = [connectivity.sampled_side(inputs, outputs, rule) for rule in RULES]
    assert tuple(sides) == expected


def test_compression_keeps_fewer_connections_if_the_inputs_draw():
    """48 -> 96 with degree 48 / 2: a quarter of the pairs, not half."""
    assert draw(48, 96, 24, "smaller_side")[1].mean() == 1 / 4
    assert draw(48, 96, 24, "per_output")[1].mean() == 1 / 2


def test_degrees_on_the_other_side_are_those_of_independent_draws():
    """Their mean is k I / O; with a small degree, some channels have none."""
    masks = [draw(32, 64, 4, "per_input", seed)[1] for seed in range(20)]
    degrees = np.stack([mask.sum(0) for mask in masks])
    assert degrees.mean() == 2
    dead = (degrees == 0).sum(1).mean()
    expected = 64 * (1 - 4 / 64) ** 32  # 8.1
    assert expected - 2 < dead < expected + 2


@pytest.mark.parametrize("degree", [0, -1, 9])
def test_an_impossible_degree_is_rejected_with_both_numbers(degree):
    with pytest.raises(ValueError, match=rf"in 1..8, got {degree}: .* 8 partners"):
        draw(8, 16, degree, "per_output")


def test_an_unknown_rule_is_rejected_with_the_choices():
    with pytest.raises(ValueError, match=r"per_edge.*smaller_side.*per_input"):
        draw(8, 8, 2, "per_edge")


def test_a_graph_is_a_function_of_seed_and_path():
    def edges(seed, path):
        rng = connectivity.make_layer_rng(seed, path)
        return connectivity.draw_expander(16, 16, 4, "per_output", rng).tolist()

    assert edges(0, "blocks.0.conv1") == edges(0, "blocks.0.conv1")
    assert edges(0, "blocks.0.conv1") != edges(1, "blocks.0.conv1")
    assert edges(0, "blocks.0.conv1") != edges(0, "blocks.0.conv2")


def test_grouped_connects_equal_blocks():
    edges = connectivity.connect_groups(4, 6, 2)
    expected = np.zeros((4, 6), bool)
    expected[:2, :3] = expected[2:, 3:] = True
    np.testing.assert_array_equal(connectivity.to_matrix(edges, 4, 6), expected)
    with pytest.raises(ValueError, match="4 groups do not divide 6 output"):
        connectivity.connect_groups(8, 6, 4)


def test_recorded_graphs_are_reproduced(shared):
    recorded = json.loads((shared / "golden/xnets/graphs.json").read_text())["graphs"]
    assert len(recorded) > 40
    for facts in recorded:
        inputs, outputs = facts["I"], facts["O"]
        rng = generator(f"graph/{facts['name']}/connections")
        sampling = f"per_{facts['side']}"
        edges = connectivity.draw_expander(inputs, outputs, facts["k"], sampling, rng)
        mask = connectivity.to_matrix(edges, inputs, outputs).T
        assert zlib.crc32(np.packbits(mask).tobytes()) == facts["mask_crc32"]
        for axis, name in ((1, "inputs_per_output"), (0, "outputs_per_input")):
            degrees, known = mask.sum(axis), facts[name]
            assert (degrees.min(), degrees.max()) == (known["min"], known["max"])
            assert (degrees == 0).sum() == known["zeros"]
        if facts["head_rule"]:
            rule = connectivity.sampled_side(inputs, outputs, "smaller_side")
            assert rule == facts["side"]

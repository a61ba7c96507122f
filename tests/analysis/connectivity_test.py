"""The tables, csv files and figure of analysis.connectivity."""

import csv
import re
import subprocess
import sys

import numpy as np
import pytest

from analysis import connectivity, graphs, twins
from configs import cfmz, gunn, igcnets, xdensenet


def small(module, argument="", **fields):
    """Returns a configuration with `fields` of the net replaced."""
    config = module.get_config(argument)
    with config.unlocked():
        config.net.update(fields)
    return config


def test_layers_are_in_execution_order_and_spread_over_seeds():
    config = small(xdensenet, "40-24-2,cifar10", depth=10, growth=8)
    found = connectivity.layers(config, graph_seeds=2)
    assert list(found)[:2] == ["stem", "blocks.0.0.conv1"]
    assert list(found)[-1] == "classifier"
    kind, (first, second) = found["blocks.0.0.conv1"]
    assert kind == "ExpanderConv"
    assert first.edges == second.edges
    assert first.second != second.second
    assert found["stem"][1][0] == found["stem"][1][1]
    config.net.graph_seed = 1
    assert connectivity.layers(config)["blocks.0.0.conv1"][1] == [second]


def test_each_unit_of_a_gradual_layer_has_its_own_expander():
    wiring = dict(kind="expander", compress=2)
    config = small(gunn, channels=(16, 24), segments=(4, 3))
    config.net.wiring.update(wiring)
    found = connectivity.layers(config)
    units = [path for path in found if re.search(r"\[\d\]$", path)]
    stems = {path.partition("[")[0] for path in units}
    first = min(stems)
    graphs = [found[f"{first}[{i}]"][1][0] for i in range(4)]
    assert len({graph.second for graph in graphs}) > 1


def test_row_shows_ranges_and_spread():
    cycle = np.eye(4) + np.roll(np.eye(4), 1, axis=1)
    blocks = np.kron(np.eye(2), np.ones((2, 2)))
    seeds = [graphs.measure(graph.astype(bool)) for graph in (cycle, blocks)]
    row = connectivity.table_row("stem", "Conv", seeds)
    assert row[:8] == ("stem", "Conv", "4", "4", "8", "0.5000", "2", "2")
    # cos(pi / 4) and 1: their mean, and their difference over sqrt(2).
    assert row[8:] == ("0/0", "1..2", "1.0000", "0.8536 +- 0.2071", "1.0000", "1/2")


def run(*arguments):
    command = [sys.executable, "-m", "analysis.connectivity", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_command_prints_tables_and_writes_csvs_and_a_figure(tmp_path):
    graphs, paths_csv, image = (tmp_path / x for x in ("g.csv", "p.csv", "c.png"))
    wiring = "--config.net.wiring.kind=expander", "--config.net.wiring.compress=3"
    overrides = "--config.net.depth=8", *wiring
    options = "--graph_seeds=2", f"--csv={graphs}", f"--paths_csv={paths_csv}"
    done = run("configs/cfmz.py:20", *overrides, *options, f"--out={image}")
    assert done.returncode == 0, done.stderr
    first, _, second = done.stdout.partition("\n\n")
    header, *lines = first.splitlines()
    assert header.split()[0] == "layer"
    layers = [line.split()[0] for line in lines]
    expected = connectivity.layers(small(cfmz, "20", depth=8))
    assert layers == list(expected)
    with graphs.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["layer"] for row in rows] == [x for x in layers for _ in range(2)]
    assert [row["graph_seed"] for row in rows[:2]] == ["0", "1"]
    assert rows[0]["edges"] == str(3 * 16)

    sources, header, expander, dense, *others = second.splitlines()
    assert sources.startswith("paths from 16 output channels of stem to 64 input")
    assert header.split()[0] == "wiring"
    assert dense.startswith("dense")
    assert expander.startswith("expander, compress 3")
    # Twins that cannot be built.
    grouped, interleaved = others
    assert grouped == "grouped, 3 groups: 3 groups do not divide 16 input channels"
    assert interleaved.startswith("interleaved, 3 x M: 3 primary groups do not divide")
    with paths_csv.open() as file:
        rows = list(csv.DictReader(file))
    wirings = [
        (row["wiring"], row["graph_seed"]) for row in rows if row["depth"] == "1"
    ]
    compressed = "expander, compress 3"
    assert wirings == [(compressed, "0"), (compressed, "1"), ("dense", "0")]
    # Two convolutions in each block; shortcuts append zeros.
    product = np.eye(16, dtype=int)
    for inputs, outputs in ((16, 16), (16, 32), (32, 64)):
        shape = inputs, outputs
        product = product @ (outputs * np.ones(shape, int) + np.eye(*shape, dtype=int))
    counted = [int(rows[-1][key]) for key in ("smallest", "total", "largest")]
    assert counted == [product.min(), product.sum(), product.max()]
    assert image.read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {"g.csv", "p.csv", "c.png"}


def test_twins_are_sparse_by_the_same_number():
    config = small(xdensenet, "40-24-2,cifar10")
    sections = twins.sections(config.net)
    names = ["expander, compress 2", "dense", "grouped, 2 groups", "interleaved, 2 x M"]
    assert list(sections) == names
    assert sections[names[0]] == config.net.to_dict()
    config = small(igcnets, "plain-38-L24M2")
    names = ["interleaved, 24 x M", "dense", "expander, compress 24"]
    assert list(twins.sections(config.net))[:3] == names


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["configs/nothing.py"], "configs/ has"),
        *(
            pytest.param(["configs/cfmz.py:20", flag], named, marks=pytest.mark.slow)
            for flag, named in (
                ("--config.data.name=mine", "choose --config.data.name"),
                ("--config.net.wiring.kind=ring", "unknown wiring"),
                ("--out=figure.txt", "--out=figure.txt"),
            )
        ),
    ],
)
def test_bad_input_ends_in_one_line(arguments, named):
    done = run(*arguments)
    assert done.returncode == 1
    assert not done.stdout
    (line,) = [x for x in done.stderr.splitlines() if x.startswith("error:")]
    assert named in line
    assert "Traceback" not in done.stderr

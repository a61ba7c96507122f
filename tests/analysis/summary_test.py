"""The tables agree with the nets and the published figures."""

import csv
import re
import sys

import numpy as np
import pytest

from analysis import summary
from configs import cfmz
from configs.data_sets import DATA_SETS
from tests.support.counting import with_classes
from tests.support.families import FAMILIES


def smallest(family):
    """Returns the row of a family that has the fewest parameters."""
    rows = FAMILIES[family].VARIANTS.items()
    counts = {(v, data): n for v, row in rows for data, n in row.parameters.items()}
    return (family, *min(counts, key=counts.get))


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["summary", *arguments])
    summary.main()


def test_the_table_has_every_variant_with_its_parameters():
    parameters = {
        (family, variant, data): count
        for family, module in FAMILIES.items()
        for variant, row in module.VARIANTS.items()
        for data, count in row.parameters.items()
    }
    table = summary.read_table()
    assert {key: counts["parameters"] for key, counts in table.items()} == parameters


# Counting even the smallest DelugeNet or ImageNet net takes seconds: the slow test
# below counts them, too.
@pytest.mark.parametrize(
    "family", sorted(FAMILIES.keys() - {"delugenets", "ximagenet"})
)
def test_the_table_holds_the_counts_of_the_smallest_net(family):
    key = smallest(family)
    (row,) = summary.rows([key], recount=True)
    assert {name: row[name] for name in summary.COUNTS} == summary.read_table()[key]


def stacks(family):
    """Returns lists of the keys of nets that differ only in depth, shallowest first.

    Their stages consist of equal blocks, so that each block costs the same.
    """
    found = {}
    for variant, row in FAMILIES[family].VARIANTS.items():
        blocks = row.net.get("name") in ("cfmz_resnet", "resnet", "plain", "igc_resnet")
        if blocks and row.net.get("form") != "imagenet":
            rest = {name: x for name, x in row.net.items() if name != "depth"}
            for data in row.parameters:
                stack = found.setdefault((repr(rest), data), [])
                stack.append((row.net["depth"], (family, variant, data)))
    return [sorted(stack) for stack in found.values()]


@pytest.mark.parametrize("family", ["cfmz", "fb_resnet", "igcnets"])
def test_counts_are_linear_in_the_number_of_blocks(family):
    table, deep = summary.read_table(), [x for x in stacks(family) if len(x) > 2]
    assert deep
    for stack in deep:
        depths, keys = zip(*stack, strict=True)
        counts = np.array([[*table[key].values()] for key in keys])
        more, blocks = counts - counts[0], np.array(depths)[:, None] - depths[0]
        np.testing.assert_array_equal(more * blocks[1], more[1] * blocks)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_holds_the_counts_of_every_net(family):
    """Counts each net for one data set and derives the counts for the others.

    Of a stack, deeper nets without a published error are not counted, because the two
    shallowest nets determine them.
    """
    module, table = FAMILIES[family], summary.read_table()
    deeper = {key for stack in stacks(family) for _, key in stack[2:]}
    for variant, row in module.VARIANTS.items():
        keys = [(family, variant, data) for data in row.parameters]
        if not row.published and deeper.issuperset(keys):
            continue
        layers = summary.layers(module.get_config(f"{variant},{keys[0][-1]}"))
        for key in keys:
            found = with_classes(layers, DATA_SETS[key[-1]].num_classes)
            assert summary.add_up(found) == table[key], key


def test_the_dense_column_is_the_dense_twins_for_every_wiring():
    counts = summary.read_table()
    dense = counts["xdensenet", "40-24", "cifar10"]["parameters"]
    for variant in ("40-24", "40-24-2", "40-24-groups-2"):
        assert counts["xdensenet", variant, "cifar10"]["dense"] == dense
    # By hand: a stem and two blocks of one 3x3 convolution in each of three stages.
    weights = 3 * 48 + 2 * 48**2 + (48 + 96) * 96 + (96 + 192) * 192
    norms, classifier = 2 * (3 * 48 + 2 * 96 + 2 * 192), 193 * 10
    dense = counts["igcnets", "plain-8-L24M2", "cifar10"]["dense"]
    assert dense == 9 * weights + norms + classifier


def test_a_row_holds_counts_layers_and_the_published_error():
    (row,) = summary.rows([("cfmz", "20", "cifar10")])
    # He et al. 2015 print 0.27M; 40.6M by hand: specs of the CIFAR ResNet-20.
    counts = ("269,732", "269,732", "40.6M", "20", "", "8.29 (last)")
    assert summary.cells(row) == ("cfmz", "20", "cifar10", *counts)


def test_a_published_figure_that_does_not_fit_is_printed_with_a_note():
    (row,) = summary.rows([("xdensenet", "40-36-2", "cifar10")])
    cells = summary.cells(row)
    assert cells[3] == "835,066"
    assert cells[-2] == "0.75M 324M"
    assert "no reading of the code has 0.75M parameters" in cells[-1]


def test_layers_add_up_to_the_total():
    *rows, total = summary.layer_rows(cfmz.get_config("20"))
    for column in (3, 4, 5):
        numbers = [int(row[column].replace(",", "")) for row in rows]
        assert sum(numbers) == int(total[column].replace(",", ""))
    assert rows[0][:3] == ("stem", "Conv", "32x32x16")


def test_patterns_select_variants_and_data_sets():
    found = summary.select(["*40-48*"], "cifar10")
    assert found == [
        ("xdensenet", variant, "cifar10")
        for variant in ("40-48-2", "40-48", "40-48-groups-2")
    ]
    for pattern in ("cfmz", "configs/cfmz.py", "cfmz:*"):
        assert [row[1] for row in summary.select([pattern])] == [*cfmz.VARIANTS]
    # A row appears once, however many patterns match it.
    assert summary.select(["cfmz:20", "cfmz:2*"]) == [("cfmz", "20", "cifar10")]
    assert len(summary.select([])) == len(summary.read_table())


def test_rows_come_from_the_table_sorted(monkeypatch, capsys):
    monkeypatch.setattr(summary, "layers", None)  # nothing is counted
    run(monkeypatch, "--sort=error")
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == list(summary.HEADER)
    assert len(lines) == len(summary.read_table())
    assert " 1.56 (last)" in lines[0]  # on SVHN
    assert lines[-1].split()[-1].isdigit()  # a variant without a published error


def test_csv_is_printed_or_written(monkeypatch, capsys, tmp_path):
    run(monkeypatch, "cfmz", "--sort=macs", "--csv=-")
    text = capsys.readouterr().out
    run(monkeypatch, "cfmz", "--sort=macs", f"--csv={tmp_path / 'table.csv'}")
    assert (tmp_path / "table.csv").read_text() == text
    rows = [*csv.DictReader(text.splitlines())]
    assert [row["variant"] for row in rows] == [*cfmz.VARIANTS]
    assert (rows[0]["parameters"], rows[0]["error"]) == ("269732", "8.29")


def test_a_variant_that_is_not_in_the_table_is_counted(monkeypatch, tmp_path):
    text = summary.TABLE.read_text()
    shorter = re.sub("^cfmz,20,.*\n", "", text, flags=re.MULTILINE)
    assert shorter != text
    monkeypatch.setattr(summary, "TABLE", tmp_path / "variants.csv")
    summary.TABLE.write_text(shorter)
    (row,) = summary.rows([("cfmz", "20", "cifar10")])
    assert row["macs"] == 40_551_040


def test_update_writes_the_table(monkeypatch, tmp_path):
    text = summary.TABLE.read_text()
    table = summary.read_table()
    monkeypatch.setattr(summary, "TABLE", tmp_path / "variants.csv")
    monkeypatch.setattr(summary, "count", lambda *key: table[key])
    run(monkeypatch, "--update")
    assert summary.TABLE.read_text() == text


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["configs/nothing.py"], "xdensenet"),
        (["configs/nothing.py:20"], "xdensenet"),
        (["configs/cfmz.py:21"], "choose from 20, 32"),
        (["*40-49*"], "expected a pattern such as"),
        (["40-24-3"], "did you mean '40-24-2'"),
        (["--data=cifar"], "choose from cifar10, cifar100"),
        (["configs/cfmz.py:20", "*40*"], "cannot be combined"),
        (["configs/cfmz.py:20", "--sort=macs"], "--sort applies to tables"),
        (["cfmz", "--csv=/proc/table.csv"], "cannot be written"),
    ],
)
def test_bad_arguments_end_in_one_line(arguments, named, monkeypatch):
    with pytest.raises(SystemExit) as exit:
        run(monkeypatch, *arguments)
    assert re.fullmatch(f"error: .*{re.escape(named)}.*", exit.value.code)

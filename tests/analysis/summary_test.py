"""The printed tables agree with the nets and the published figures."""

import itertools
import re
import sys

import pytest

from analysis import summary
from configs import cfmz


def test_rows_hold_counts_layers_and_the_published_error():
    rows = list(itertools.islice(summary.rows(["cfmz"]), 2))
    assert [row[1] for row in rows] == list(cfmz.VARIANTS)[:2]
    # He et al. 2015 print 0.27M; 40.6M by hand: specs of the CIFAR ResNet-20.
    counts = ("269,732", "269,732", "40.6M", "20", "", "8.29 (last)")
    assert rows[0] == ("cfmz", "20", "cifar10", *counts)


def test_a_published_figure_that_does_not_fit_is_printed_with_a_note():
    rows = itertools.islice(summary.rows(["xdensenet"]), 3)
    (row,) = [row for row in rows if row[1:3] == ("40-36-2", "cifar10")]
    assert row[3] == "835,066"
    assert row[-2] == "0.75M 324M"
    assert "no reading of the code has 0.75M parameters" in row[-1]


def test_layers_add_up_to_the_total():
    *rows, total = summary.layer_rows(cfmz.get_config("20"))
    for column in (3, 4, 5):
        numbers = [int(row[column].replace(",", "")) for row in rows]
        assert sum(numbers) == int(total[column].replace(",", ""))
    assert rows[0][:3] == ("stem", "Conv", "32x32x16")


@pytest.mark.parametrize(
    ("argument", "named"),
    [("configs/nothing.py", "xdensenet"), ("configs/cfmz.py:21", "choose from 20, 32")],
)
def test_unknown_choices_end_in_one_line_that_lists_them(argument, named, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["summary", argument])
    with pytest.raises(SystemExit) as exit:
        summary.main()
    assert re.fullmatch(f"error: .*{named}.*", exit.value.code)

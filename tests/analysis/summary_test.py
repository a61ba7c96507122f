"""The printed tables say what the nets are."""

import itertools
import subprocess
import sys

import pytest

from analysis import summary
from configs import cfmz


def test_a_row_holds_counts_layers_and_the_published_error():
    rows = list(itertools.islice(summary.rows(["cfmz"]), 4))  # 1202 takes a while
    assert [row[1] for row in rows] == list(cfmz.VARIANTS)[:4]
    # He et al. 2015 print 0.27M; 40.6M by hand: specs of the CIFAR ResNet-20.
    counts = ("269,732", "269,732", "40.6M", "20", "", "8.29 (last)")
    assert rows[0] == ("cfmz", "20", "cifar10", *counts)


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
def test_what_is_unknown_is_answered_with_the_choices(argument, named):
    command = [sys.executable, "-m", "analysis.summary", argument]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert named in done.stderr
    assert "Traceback" not in done.stderr

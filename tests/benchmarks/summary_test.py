"""docs/speed.md holds the committed tables, in which goals decide what is bold."""

import pathlib

import pytest

import benchmarks
from benchmarks import summary
from benchmarks.models import NETS

SPEED = pathlib.Path(benchmarks.__file__).parents[1] / "docs/speed.md"


def row(speed, of_pytorch, of_twin=""):
    row = dict(images_per_second=speed, of_pytorch=of_pytorch, of_twin=of_twin)
    return row | dict(batch_size="64", live_mib="7")


def test_a_ratio_is_bold_if_it_meets_its_floor():
    slow = {"ours": row("9.0", "0.900"), "pytorch": row("10.0", "1.000")}
    fast = {
        "ours": row("15.0", "1.500", "1.390"),
        "twin": row("12.0", "1.200"),
        "pytorch": row("10.0", "1.000"),
    }
    *_, first, second = summary.markdown(
        {"cfmz:20": slow, "xdensenet:40-24-2": fast}
    ).splitlines()
    assert first == "| cfmz:20 | 64 | 9.0 |  | 10.0 | 0.90 | 1.0, 1.2 |  |  | 7 | 7 |"
    assert "| 15.0 | 12.0 | 10.0 | **1.50** | 1.1, 1.4 | **1.39** | 1.0, 1.0" in second


@pytest.mark.parametrize("instructions", summary.RESULTS)
def test_the_document_holds_the_committed_table(instructions):
    nets = summary.read(instructions)
    assert len(nets) == len(NETS)
    assert summary.markdown(nets) in SPEED.read_text()

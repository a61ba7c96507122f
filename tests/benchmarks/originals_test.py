"""The originals' figures are the published ones, and ours stand beside them."""

import argparse
import csv
import pathlib
import re

import pytest

import benchmarks
from benchmarks import originals
from tests.conftest import SHARED

SPEED = pathlib.Path(benchmarks.__file__).parents[1] / "docs/speed.md"


def spec(name):
    path = SHARED / "specs" / name
    if not path.exists():
        pytest.skip(f"reference material {path} is not here")
    return path.read_text()


def published(system):
    return {x.variant: x for group in originals.SYSTEMS[system] for x in group}


def test_cfmz_is_published_so():
    rows = re.findall(
        r"^\| (\d+) \| (\d+) \| (\d+) \| [\d.]+ \| [\d.]+ \|$",
        spec("cfmz_resnet.md"),
        re.M,
    )
    wanted = {f"cfmz:{depth}": (int(memory), int(s)) for depth, memory, s in rows}
    found = {name: (x.memory, x.seconds) for name, x in published("cfmz").items()}
    assert found == wanted


def test_xnets_are_logged_so():
    rows = [line.split(" | ") for line in spec("xnets.md").splitlines()]
    rows = [row for row in rows if len(row) == 13 and row[1] == "cifar10"]
    logged = {}
    for row in rows:
        growth, compress, seconds = row[3], row[4], float(row[11])
        suffix = "" if compress == "-" else f"-{compress}"
        logged[f"xdensenet:{growth}{suffix}"] = seconds
    for name, original in published("xnets").items():
        assert original.seconds == pytest.approx(logged[name], abs=0.06), name


TURNS = []


class Player:
    """Plays at a fixed speed, and records whose turn it is."""

    def __init__(self, contestant, options):
        self.variant, self.batch_size = contestant[1], options.batch_size
        self.speeds = []

    def play(self):
        TURNS.append(self.variant)
        self.speeds.append(100.0 if self.variant.endswith("-2") else 200.0)

    def finish(self):
        facts = dict(slowest=1, fastest=1, compile_seconds=1, device="cpu", jax="0")
        return {"images_per_second": self.speeds[0], "peak_memory_mb": 7} | facts


def test_a_row_holds_both_sides(monkeypatch):
    monkeypatch.setattr(originals, "Player", Player)
    options = argparse.Namespace(dtype="float32", rounds=2, steps=3, threads=1)
    dense, expander = originals.measure(originals.SYSTEMS["xnets"][0], options)
    pair = [dense["variant"], expander["variant"]]
    assert [*pair, *reversed(pair)] == TURNS
    assert (dense["seconds"], expander["seconds"]) == (250.0, 500.0)  # 50,000 images
    assert (dense["of_dense"], expander["of_dense"]) == (1.0, 2.0)
    assert expander["published_of_dense"] == round(40.3 / 39.6, 3)
    assert expander["batch_size"] == 64
    assert expander["published_error"] == 5.17
    (row,) = originals.measure(originals.SYSTEMS["cfmz"][0], options)
    assert (row["error"], row["error_sd"], row["seeds"]) == (8.12, 0.11, 3)
    assert row["of_dense"] == ""
    header, _, line = originals.markdown([row]).splitlines()
    assert "of dense" not in header
    assert line.endswith("| 521 | 7 | 8.29 (last) | 8.12 ± 0.11 (3 seeds) |")


@pytest.mark.parametrize("system", originals.SYSTEMS)
def test_the_document_holds_the_committed_table(system):
    (path,) = benchmarks.RESULTS.glob(f"originals-{system}-*.csv")
    with path.open(newline="") as file:
        rows = [*csv.DictReader(file)]
    assert [row["variant"] for row in rows] == [*published(system)]
    assert originals.markdown(rows) in SPEED.read_text()

"""Contestants take turns, ratios compare the right ones, and results are merged."""

import argparse
import csv
import importlib
import sys

import pytest

import benchmarks
from benchmarks import models

SPEEDS = {"xdensenet:40-24-2": 30.0, "xdensenet:40-24": 20.0, "pytorch": 40.0}
TURNS = []


class Player:
    """Plays at the fixed speed of its net or framework, and records its turns."""

    def __init__(self, contestant, options, checkout=models.CHECKOUT):
        framework, variant, self.lowering = contestant
        self.name = "pytorch" if framework == "pytorch" else variant
        self.speeds, self.batch_size = [], options.batch_size

    def play(self):
        TURNS.append(self.name)
        self.speeds.append(SPEEDS[self.name])

    def finish(self):
        return {"images_per_second": self.speeds[0], "lowering": self.lowering}


def options(**changed):
    defaults = dict(lowerings=["auto"], batch_size=None, dtype="float32", rounds=2)
    defaults |= dict(steps=1, threads=1, peers=True, reference=None)
    return argparse.Namespace(**defaults | changed)


@pytest.fixture(autouse=True)
def players(monkeypatch):
    TURNS.clear()
    monkeypatch.setattr(models, "Player", Player)


def test_a_net_competes_with_its_twin_and_with_pytorch():
    rows = models.table("xdensenet:40-24-2", options())
    assert [row["framework"] for row in rows] == ["ours", "twin", "pytorch"]
    turns = ["xdensenet:40-24-2", "xdensenet:40-24", "pytorch"]
    assert [*turns, *reversed(turns)] == TURNS
    assert [row["of_pytorch"] for row in rows] == [0.75, 0.5, 1.0]
    assert [row["of_twin"] for row in rows] == [1.5, 1.0, 2.0]
    assert {row["batch_size"] for row in rows} == {64}


def test_without_peers_lowerings_compete():
    chosen = options(lowerings=["auto", "plain"], peers=False, batch_size=8)
    rows = models.table("xdensenet:40-24", chosen)
    assert [(row["framework"], row["lowering"]) for row in rows] == [
        ("ours", "auto"),
        ("ours", "plain"),
    ]
    assert [row["of_plain"] for row in rows] == [1.0, 1.0]
    assert {row["of_pytorch"] for row in rows} == {""}
    assert {row["batch_size"] for row in rows} == {8}


def test_every_default_net_has_a_configuration():
    for variant, (batch_size, twin, *_) in models.NETS.items():
        for name in filter(None, (variant, twin)):
            family, _, row = name.partition(":")
            assert row in importlib.import_module(f"configs.{family}").VARIANTS
            chosen = options(batch_size=batch_size)
            config = models.configure(name, chosen)
            assert config.train.batch_norm_groups == 1
        if twin:
            assert models.configure(variant, chosen).net.wiring.kind != "dense"
            assert models.configure(twin, chosen).net.wiring.kind == "dense"


def test_measuring_a_net_again_replaces_its_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmarks, "RESULTS", tmp_path)
    benchmarks.merge("x", [{"net": "a", "speed": 1}, {"net": "a", "speed": 2}], "net")
    benchmarks.merge("x", [{"net": "b", "speed": 3}], "net")
    benchmarks.merge("x", [{"net": "a", "speed": 4, "new": 5}], "net")
    with (tmp_path / "x.csv").open(newline="") as file:
        rows = [tuple(row.values()) for row in csv.DictReader(file)]
    assert rows == [("b", "3", ""), ("a", "4", "5")]


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ("nope:1", "unknown family 'nope' in 'nope:1': choose from cfmz, delugenets"),
        ("common:20", "unknown family 'common'"),
        ("cfmz:21", "'21'"),
    ],
)
def test_unknown_variants_are_errors_before_any_process_starts(
    variant, message, monkeypatch
):
    monkeypatch.setattr(sys, "argv", ["models", "--variants", "gunn:15", variant])
    with pytest.raises(SystemExit, match="error: ") as stop:
        models.main()
    assert message in str(stop.value)
    assert not TURNS


@pytest.mark.parametrize(("flags", "name"), [("avx512f", ""), ("avx2", "-avx2")])
def test_results_are_named_after_the_width_of_vectors(
    flags, name, tmp_path, monkeypatch
):
    monkeypatch.setattr(benchmarks.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(benchmarks, "CPU_INFO", tmp_path / "cpuinfo")
    benchmarks.CPU_INFO.write_text(f"flags : fpu avx {flags}\n")
    assert benchmarks.machine("cpu", 2) == f"x86_64{name}-2cores"
    benchmarks.CPU_INFO.unlink()  # not on Linux
    assert benchmarks.machine("cpu", 2) == "x86_64-2cores"

"""The drawing shows the graphs of all wirings and never replaces the committed one."""

import sys

import numpy as np
import pytest
from matplotlib.collections import LineCollection

from analysis import wiring


def test_titles_count_connections():
    figure = wiring.figure(in_channels=8, out_channels=8, degree=2, seed=0)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[:3] == [
        "dense\n64 of 64 connections, 8 per output",
        "grouped\n16 of 64 connections, 2 per output",
        "expander, each output draws 2\n16 of 64 connections, 2 per output",
    ]
    # If inputs draw, outputs differ in their number of connections.
    assert "16 of 64 connections" in titles[3]
    assert " to " in titles[3]
    lines = [axes.collections[0].get_segments() for axes in figure.axes]
    assert [len(segments) for segments in lines] == [64, 16, 16, 16]
    for axes, segments in zip(figure.axes, lines, strict=True):
        rows = {text.get_text(): text.get_position()[1] for text in axes.texts}
        assert rows == {"inputs": 1, "outputs": 0}
        assert {y for segment in segments for _, y in segment} == {0, 1}


def test_interleaved_pair_has_one_path_from_each_input_to_each_output():
    (axes,) = wiring.figure(16, 16, 4, 0, ["interleaved"]).axes
    title = "interleaved\n64 + 64 connections, 1 path from each input to each output"
    assert axes.get_title() == title


def test_each_gradual_update_reads_all_channels_and_copies_the_others():
    (axes,) = wiring.figure(8, 8, 2, 0, ["gradual"]).axes
    drawn, copied = axes.collections[:8:2], axes.collections[1:8:2]
    assert [len(lines.get_segments()) for lines in drawn] == [16] * 4
    assert [len(lines.get_segments()) for lines in copied] == [6] * 4
    ends = [{x for _, (x, _) in lines.get_segments()} for lines in drawn]
    assert set.union(*ends) == set(np.linspace(0, 1, 8))


def test_cross_layer_connections_stay_in_their_channel():
    (axes,) = wiring.figure(8, 8, 2, 0, ["cross_layer"]).axes
    curves = [
        curve
        for lines in axes.collections
        if isinstance(lines, LineCollection)
        for curve in lines.get_segments()
    ]
    assert len(curves) == 8 * wiring.SOURCES
    assert all(curve[0, 0] == curve[-1, 0] for curve in curves)


def test_every_wiring_can_be_drawn():
    figure = wiring.figure(16, 16, 4, 0, list(wiring.WIRINGS))
    assert len(figure.axes) == len(wiring.WIRINGS)


def test_command_writes_to_the_current_directory_by_default(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["wiring", "--in_channels=4", "--out_channels=4"])
    wiring.main()
    assert capsys.readouterr().out == "wrote wiring.png\n"
    assert (tmp_path / "wiring.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--degree=0", "--degree must divide --in_channels=16, got 0"),
        ("--degree=17", "--degree must divide --in_channels=16, got 17"),
        ("--degree=3", "--degree must divide --in_channels=16, got 3"),
        ("--in_channels=0", "--in_channels must be at least 1, got 0"),
        ("--out_channels=0", "--out_channels must be at least 1, got 0"),
        ("--seed=-1", "--seed must be at least 0, got -1"),
        ("--wirings=star", "invalid choice: 'star'"),
    ],
)
def test_impossible_flags_are_rejected(flag, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["wiring", flag])
    with pytest.raises(SystemExit):
        wiring.main()
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["gradual", "cross_layer"])
def test_wirings_that_the_sizes_rule_out_are_errors(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["wiring", "--wirings", name, "--out_channels=8"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match="keep the number of channels, got 16 -> 8"):
        wiring.main()
    assert not list(tmp_path.iterdir())

"""The drawing shows the graphs of all wirings and never replaces the committed one."""

import sys

import pytest

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
    ],
)
def test_impossible_flags_are_rejected(flag, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["wiring", flag])
    with pytest.raises(SystemExit):
        wiring.main()
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

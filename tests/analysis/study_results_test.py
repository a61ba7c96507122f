"""Statistics of studies, computed by hand."""

import csv

import pytest

from analysis import study_results
from analysis.study_results import Row
from runtime.workdir import as_csv


def make_row(wiring, seed, final=None, best=None, **fields):
    common = dict(
        run=f"net-{wiring}-8",
        backbone="net",
        width=8,
        reference_width=8,
        parameters=1000,
        macs=20_000,
        remainder=0.0,
        published=None,
        seconds_per_step=0.5 if final is not None else None,
    )
    results = dict(final_error=final, best_error=best, finished=final is not None)
    return Row(**common | results | fields, wiring=wiring, seed=seed)


ROWS = [
    *(make_row("dense", i, e, e - 1) for i, e in enumerate((10.0, 12.0, 14.0))),
    *(make_row("sparse", i, e, e - 1) for i, e in enumerate((11.0, 13.0, 16.0))),
]


def test_the_interval_is_that_of_student():
    mean, low, high = study_results.interval([1.0, 1.0, 2.0])
    assert mean == pytest.approx(4 / 3)
    # t(0.975, 2) = 4.302653; the standard error is sqrt(1/3) / sqrt(3) = 1/3.
    half = 4.302653 / 3
    assert (low, high) == pytest.approx((4 / 3 - half, 4 / 3 + half), abs=1e-6)
    assert study_results.interval([1.0]) is None


def test_differences_are_paired_by_seed():
    dense, sparse = ROWS[:3], ROWS[3:]
    shuffled = [sparse[2], sparse[0], sparse[1]]
    found = study_results.differences(shuffled, dense, "final_error")
    assert sorted(found) == [1.0, 1.0, 2.0]
    unpaired = [dense[0], make_row("dense", 1), dense[2]]
    assert study_results.differences(sparse, unpaired, "final_error") == [1.0, 2.0]


def test_the_table_shows_means_deviations_and_intervals():
    columns = ("seeds", "final", "final_difference", "best")
    lines = study_results.table(ROWS, "dense", columns).splitlines()
    assert lines[2] == "| net dense (reference) | 3 | 12.00 ± 2.00 |  | 11.00 ± 2.00 |"
    difference = "+1.33 [-0.10, +2.77]"
    assert (
        lines[3] == f"| net sparse | 3 | 13.33 ± 2.52 | {difference} | 12.33 ± 2.52 |"
    )


def test_unfinished_runs_are_counted_and_left_out_of_the_means():
    rows = [*ROWS[:3], ROWS[3], make_row("sparse", 1), make_row("sparse", 2)]
    columns = ("seeds", "final", "final_difference")
    line = study_results.table(rows, "dense", columns).splitlines()[3]
    assert line == "| net sparse | 1/3 | 11.00 | +1.00 |"


def test_nets_are_compared_within_their_backbone_and_width():
    wide = [make_row("dense", 0, 5.0, 5.0, reference_width=16, width=16)]
    wide.append(make_row("sparse", 0, 4.0, 4.0, reference_width=16, width=23))
    lines = study_results.table([*ROWS, *wide], "dense", ["width", "final_difference"])
    assert lines.splitlines()[-1] == "| net sparse | 23 | -1.00 |"


def test_a_run_is_measured_from_its_tables(tmp_path):
    steps = [{"step": 10, "test_accuracy": 0.75}, {"step": 20, "test_accuracy": 0.5}]
    (tmp_path / "metrics.csv").write_text(as_csv(steps))
    rates = (0.0, 100.0, 200.0, 400.0)  # 0: not timed
    speeds = [{"step": i, "images_per_second": rate} for i, rate in enumerate(rates)]
    (tmp_path / "speed.csv").write_text(as_csv(speeds))
    assert study_results.measure(tmp_path, batch_size=50) == dict(
        final_step=20,
        final_error=50.0,
        best_step=10,
        best_error=25.0,
        seconds_per_step=0.25,
    )


def test_results_are_written(tmp_path):
    rows = [*ROWS, make_row("other", 0)]
    rows = [*rows, make_row("known", 0, 9.0, 9.0, published=8.5)]
    options = dict(claim="It is so.", equal="parameters", reference="dense")
    study_results.write(tmp_path, rows, **options)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("study.csv", "table.md", "figure.png")
    }
    with (tmp_path / "study.csv").open() as file:
        read = list(csv.DictReader(file))
    assert [row["final_error"] for row in read[:3]] == ["10.0", "12.0", "14.0"]
    assert (read[6]["finished"], read[6]["final_error"]) == ("False", "")
    assert (tmp_path / "table.md").read_text().startswith("It is so.\n")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_the_figure_shows_every_price_and_the_published_error():
    row = make_row("known", 0, 9.0, 9.0, published=8.5)
    panels = study_results.figure([*ROWS, row]).axes
    assert len(panels) == 3
    for axes in panels:
        lines = {line.get_label(): line.get_ydata() for line in axes.lines}
        assert lines["net known, published"] == [8.5]


def test_the_figure_separates_nets_of_equal_price_and_starts_at_zero():
    disturbed = make_row("dense", 3, 12.0, 11.0, seconds_per_step=9.0)
    rows = [*ROWS, disturbed, make_row("unfinished", 0)]
    figure = study_results.figure(rows, "A claim.")
    assert figure.axes[-1].get_xlim()[1] < 1  # the median is 0.5 seconds
    assert figure.get_suptitle() == "A claim."
    for axes in figure.axes:
        assert axes.get_xlim()[0] == 0
        bars = axes.containers
        assert [bar.get_label() for bar in bars] == [
            *("net dense, 4 seeds", "net sparse, 3 seeds")
        ]
        dense, sparse = (bar.lines[0].get_xdata()[0] for bar in bars)
        assert dense < sparse < 1.1 * dense

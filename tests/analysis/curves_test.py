"""Statistics of several runs, computed by hand."""

import pytest

from analysis import curves
from configs import cfmz
from input_pipeline import Facts
from runtime.workdir import as_csv, save_config


def save(workdir, accuracies, **fields):
    """Writes the files of a finished run."""
    config = cfmz.get_config()
    config.update(fields)
    classes = tuple(map(str, range(10)))
    facts = Facts(classes, (32, 32, 3), (0.0,) * 3, (1.0,) * 3, num_train=50_000)
    save_config(workdir, config, facts)
    rows = [
        {"step": 10 * i, "epoch": float(i), "test_accuracy": accuracy}
        for i, accuracy in enumerate(accuracies, 1)
    ]
    (workdir / "metrics.csv").write_text(as_csv(rows))
    return workdir


def test_runs_that_differ_only_in_their_seed_share_a_row(tmp_path):
    first = save(tmp_path / "a", [0.5, 0.8, 0.7])
    second = save(tmp_path / "b", [0.6, 0.6, 0.9], seed=1)
    other = save(tmp_path / "c", [0.25], train={"batch_size": 64})
    groups = curves.read([first, second, other])
    assert [len(runs) for runs in groups.values()] == [2, 1]
    rows = curves.table(groups).splitlines()[2:]
    # Errors 30 and 10: mean 20, deviation 14.14; best 20 and 10: 15 and 7.07.
    name = "cfmz_resnet 20, cifar10"
    # Medians of the last five: 30 and 40.
    spread = "20.00 | 14.14 | 35.00 | 7.07 | 15.00 | 7.07"
    assert rows[0] == f"| {name} | 3 | 2 | {spread} |"
    assert rows[1] == f"| {name} (2) | 1 | 1 | 75.00 |  | 75.00 |  | 75.00 |  |"


def test_last_5_is_the_median_of_the_last_five_evaluations(tmp_path):
    groups = curves.read([save(tmp_path / "a", [0.5, 0.9, 0.1, 0.8, 0.2, 0.7])])
    assert curves.table(groups).splitlines()[2].split(" | ")[5] == "30.00"


def test_seeds_of_a_workdir_are_found_and_each_run_counts_once(tmp_path):
    (tmp_path / "run").mkdir()
    runs = [save(tmp_path / "run" / f"seed{i}", [0.5], seed=i) for i in range(3)]
    groups = curves.read([tmp_path / "run", runs[1]])
    assert [len(runs) for runs in groups.values()] == [3]


def test_a_repeated_run_is_rejected(tmp_path):
    runs = [save(tmp_path / name, [0.5, 0.8]) for name in "ab"]
    with pytest.raises(ValueError, match=r"/b repeats the configuration and seed .*/a"):
        curves.read(runs)


def test_a_shorter_run_is_a_separate_row(tmp_path):
    runs = [save(tmp_path / "a", [0.5, 0.8]), save(tmp_path / "b", [0.5], seed=1)]
    assert [len(runs) for runs in curves.read(runs).values()] == [1, 1]


def test_rows_are_numbered_only_if_their_names_are_equal(tmp_path):
    runs = [
        save(tmp_path / name, [0.5], data={"name": name})
        for name in ("cifar100", "cifar10")
    ]
    assert list(curves.read(runs)) == [
        "cfmz_resnet 20, cifar100",
        "cfmz_resnet 20, cifar10",
    ]


def test_a_modern_run_is_named_so(tmp_path):
    (name,) = curves.read([save(tmp_path / "a", [0.5], recipe="modern")])
    assert name == "cfmz_resnet 20, cifar10, modern"


def test_the_plot_has_a_line_for_each_run(tmp_path):
    groups = curves.read([save(tmp_path / "a", [0.5, 0.75])])
    (line,) = curves.figure(groups).axes[0].lines
    assert [*line.get_xdata()] == [1.0, 2.0]
    assert [*line.get_ydata()] == [50.0, 25.0]


def test_a_directory_without_a_run_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}/config.json does not exist"):
        curves.read([tmp_path])

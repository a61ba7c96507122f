"""Statistics of several runs, computed by hand."""

import pytest

import nets
from analysis import curves
from configs import cfmz, fb_resnet, gunn, igcnets, xdensenet, ximagenet
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
    assert [group.seeds for group in groups.values()] == ["2 seeds", "1 seed"]
    rows = curves.table(groups).splitlines()[2:]
    # Errors 30 and 10: mean 20, deviation 14.14; best 20 and 10: 15 and 7.07.
    name = "cfmz ResNet 20, CIFAR-10"
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
    assert [len(group.curves) for group in groups.values()] == [3]


def test_a_repeated_run_is_rejected(tmp_path):
    runs = [save(tmp_path / name, [0.5, 0.8]) for name in "ab"]
    with pytest.raises(ValueError, match=r"/b repeats the configuration and seed .*/a"):
        curves.read(runs)


def test_a_shorter_run_is_a_separate_row(tmp_path):
    runs = [save(tmp_path / "a", [0.5, 0.8]), save(tmp_path / "b", [0.5], seed=1)]
    assert [len(group.curves) for group in curves.read(runs).values()] == [1, 1]


def test_rows_are_numbered_only_if_their_names_are_equal(tmp_path):
    runs = [
        save(tmp_path / name, [0.5], data={"name": name})
        for name in ("cifar100", "cifar10")
    ]
    assert list(curves.read(runs)) == [
        "cfmz ResNet 20, CIFAR-100",
        "cfmz ResNet 20, CIFAR-10",
    ]


def test_a_modern_run_is_named_so(tmp_path):
    (name,) = curves.read([save(tmp_path / "a", [0.5], recipe="modern")])
    assert name == "cfmz ResNet 20, CIFAR-10, modern"


@pytest.mark.parametrize(
    ("family", "variant", "name"),
    [
        (xdensenet, "40-24-2,cifar10", "X-DenseNet 40-24-2, CIFAR-10"),
        (xdensenet, "40-24,cifar100", "DenseNet 40-24, CIFAR-100"),
        (ximagenet, "densenet-121-2", "X-DenseNet 121-2, ImageNet"),
        (igcnets, "plain-20-L24M2,svhn_cropped", "IGC plain-20-L24M2, SVHN"),
        (gunn, "15", "GUNN 15, CIFAR-10"),
        (fb_resnet, "resnet-20,cifar10", "ResNet 20, CIFAR-10"),
    ],
)
def test_runs_have_the_names_of_the_papers(family, variant, name):
    assert curves.describe(family.get_config(variant)) == name


def test_a_grouped_twin_is_named():
    config = xdensenet.get_config("22-8-2,digits")
    config.net.wiring.kind = "grouped"
    assert curves.describe(config) == "grouped DenseNet 22-8-2, digits"


def test_a_name_holds_no_path():
    config = cfmz.get_config("20,digits")
    config.data.name = "/tmp/flowers.npz"
    assert curves.describe(config) == "cfmz ResNet 20, flowers"


def test_every_net_has_a_name():
    assert curves.NETS.keys() == set(nets.names())


def test_only_the_published_net_has_a_published_error():
    config = xdensenet.get_config("40-24-2,cifar10")
    assert curves.find_published(config).error == 5.17
    config.net.growth = 12
    assert curves.find_published(config) is None
    assert curves.find_published(xdensenet.get_config("22-8-2,digits")) is None


def test_the_plot_has_a_line_for_each_run_and_one_for_the_published_error(tmp_path):
    runs = [save(tmp_path / x, [0.5, 0.75], seed=i) for i, x in enumerate("ab")]
    figure = curves.figure(curves.read(runs))
    (axes,) = figure.axes
    *lines, published = axes.lines
    for line in lines:
        assert [*line.get_xdata()] == [1.0, 2.0]
        assert [*line.get_ydata()] == [50.0, 25.0]
    assert {*published.get_ydata()} == {8.29}
    assert published.get_linestyle() == "--"
    figure.canvas.draw()
    ticks = [x for x in axes.get_xticks() if 1 <= x <= 2]
    assert ticks == [1, 2]
    (legend,) = figure.legends
    texts = [text.get_text() for text in legend.texts]
    assert texts == [
        "cfmz ResNet 20, CIFAR-10, 2 seeds",
        "cfmz ResNet 20, published: 8.29 % (last)",
    ]
    boxes = [x.get_window_extent() for x in (legend, axes)]
    assert boxes[0].y1 <= boxes[1].y0  # below the curves


def test_few_evaluations_have_markers(tmp_path):
    for count, marked in ((1, True), (curves.MARKED, True), (curves.MARKED + 1, False)):
        run = save(tmp_path / str(count), [0.5] * count)
        line = curves.figure(curves.read([run])).axes[0].lines[0]
        assert (line.get_marker() == "o") == marked


def test_a_metrics_file_is_read_as_the_run_of_a_config(tmp_path):
    files = [save(tmp_path / x, [0.5, 0.8]) / "metrics.csv" for x in "ab"]
    arguments = [f"gunn:15,cifar10={file}" for file in files]
    ((name, group),) = curves.read(arguments).items()
    assert (name, group.seeds) == ("GUNN 15, CIFAR-10", "2 seeds")
    assert group.published.error == 4.15
    with pytest.raises(ValueError, match="unknown family 'gun': choose from"):
        curves.read([f"gun:15={files[0]}"])
    other = tmp_path / "notes.txt"
    other.write_text("step\n1\n")
    with pytest.raises(ValueError, match=r"notes\.txt is not the metrics\.csv"):
        curves.read([f"gunn:15={other}"])


def test_a_directory_without_a_run_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}/config.json does not exist"):
        curves.read([tmp_path])


def test_a_file_without_the_name_of_its_net_is_named(tmp_path):
    file = save(tmp_path, [0.5]) / "metrics.csv"
    with pytest.raises(ValueError, match=f"{file} is a file: .*DATA=FILE"):
        curves.read([file])

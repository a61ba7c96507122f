"""Studies: expansion, equal prices, sharding, and short runs on the embedded digits."""

import dataclasses
import itertools
import pathlib
import sys

import jax
import pytest
from flax import nnx

import train
from analysis import study, study_plan
from analysis.study_plan import Study
from nets import cost
from runtime import processes
from runtime.workdir import as_csv, read_rows

FILES = sorted(study_plan.STUDIES.glob("*.py"))
EXPANDER = dict(net=dict(wiring=dict(kind="expander", sampling="per_output")))
DENSE = dict(net=dict(wiring=dict(kind="dense")))
# A net so small that a run takes seconds, most of them to compile.
CHANGES = dict(
    net=dict(depth=10),
    train=dict(epochs=0.1, tensorboard=False, compilation_cache=False),
    optimizer=dict(drop_epochs=()),
    checkpoint=dict(keep=1),
)


def make_study(**fields) -> Study:
    densenet = dict(
        config="configs/xdensenet.py:22-8-2,digits",
        width=dict(growth=1),
        widths=(8,),
    )
    given = dict(
        claim="a test",
        backbones=dict(densenet=densenet),
        wirings=dict(expander=EXPANDER, dense=DENSE),
        reference="expander",
        changes=CHANGES,
        tolerance=0.2,
        seeds=2,
    )
    return Study(**given | fields)


def make_runs(the_study, workdir):
    return study_plan.make_runs(
        study_plan.expand(the_study), the_study.seeds, pathlib.Path(workdir)
    )


def test_a_study_expands_to_ordinary_runs():
    runs = make_runs(make_study(equal="width"), "W")
    assert [str(run.workdir) for run in runs] == [
        *("W/densenet-expander-8/seed0", "W/densenet-dense-8/seed0"),
        *("W/densenet-expander-8/seed1", "W/densenet-dense-8/seed1"),
    ]
    for run in runs:
        net = run.config.net
        assert run.config.seeds == 1
        assert run.config.seed == net.graph_seed == int(run.workdir.name[-1])
        assert (net.name, net.depth, net.growth) == ("densenet", 10, 8)
        assert net.wiring.kind in run.name
        assert run.config.train.epochs == 0.1
        assert run.config.data.name == "digits"


@pytest.mark.parametrize("equal", ["parameters", "macs"])
def test_prices_are_equal(equal):
    reference, other = study_plan.expand(make_study(equal=equal))
    assert (reference.width, reference.remainder) == (8, 0.0)
    price, target = getattr(other, equal), getattr(reference, equal)
    assert other.remainder == pytest.approx(price / target - 1, abs=1e-6)
    assert other.width == 6
    dense = make_study(wirings=dict(dense=DENSE), reference="dense", equal="width")
    section = dense.backbones["densenet"]
    for width in (5, 7):  # neither neighbour is nearer
        backbones = dict(densenet=section | dict(widths=(width,)))
        [net] = study_plan.expand(dataclasses.replace(dense, backbones=backbones))
        assert abs(getattr(net, equal) - target) > abs(price - target)


def test_a_wiring_may_widen_in_its_own_fields():
    """Interleaved: L primary partitions of M = 2 channels; L is solved."""
    interleaved = dict(
        net=dict(wiring=dict(kind="interleaved")),
        width=dict(width=2, wiring=dict(primary_groups=1)),
    )
    plain = dict(
        config="configs/igcnets.py:plain-8-W16", width=dict(width=1), widths=(8,)
    )
    _, net = study_plan.expand(
        make_study(
            backbones=dict(plain=plain),
            wirings=dict(dense=DENSE, interleaved=interleaved),
            reference="dense",
            changes={},
        )
    )
    assert net.config.net.width == 2 * net.width
    assert net.config.net.wiring.primary_groups == net.width
    assert abs(net.remainder) < 0.1


def test_the_published_error_is_that_of_the_same_net():
    section = dict(
        config="configs/xdensenet.py:40-24-2,cifar10",
        width=dict(growth=1),
        widths=(24,),
    )
    options = dict(backbones=dict(densenet=section), equal="width")
    expander, _ = study_plan.expand(make_study(**options, changes={}))
    assert expander.published == 5.17  # 40-24-2, which has dense transitions
    changes = dict(net=dict(wired_transitions=True))
    expander, dense = study_plan.expand(make_study(**options, changes=changes))
    assert (expander.published, dense.published) == (None, 5.21)  # 40-24


def test_fields_of_all_runs_can_be_overridden():
    flags = ["--config.data.dir=/data", "--config.train.epochs=2", "--config.seed=5"]
    run = study_plan.make_runs(
        study_plan.expand(make_study(equal="width"), flags), 1, pathlib.Path("W")
    )[0]
    assert run.config.data.dir == "/data"
    assert run.config.train.epochs == 2.0
    assert run.name == "densenet-expander-8/seed5"


def test_recipes_are_compared_in_the_same_net():
    adamw = dict(optimizer=dict(name="adamw"), train=dict(label_smoothing=0.1))
    recipes = dict(sgd={}, adamw=adamw)
    sgd, other = study_plan.expand(
        make_study(wirings=recipes, reference="sgd", equal="width")
    )
    assert (sgd.config.optimizer.name, sgd.config.train.label_smoothing) == ("sgd", 0)
    assert (other.config.optimizer.name, other.remainder) == ("adamw", 0.0)
    assert other.config.train.label_smoothing == 0.1
    assert other.config.net == sgd.config.net


def test_a_bad_recipe_is_refused_before_any_run():
    bad = dict(optimizer=dict(weight_decay=-1.0))
    with pytest.raises(ValueError, match=r"densenet bad: .*weight_decay"):
        study_plan.expand(
            make_study(wirings=dict(sgd={}, bad=bad), reference="sgd", equal="width")
        )


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.train.epoch=2", "no field 'epoch'.*did you mean.*epochs"),
        ("--config.train.epochs=x y", "expected a value of type float"),
        ("--epochs=2", "unknown flag --epochs=2; fields are --config.FIELD=VALUE"),
    ],
)
def test_bad_overrides_are_refused(flag, message):
    with pytest.raises(ValueError, match=message):
        study_plan.expand(make_study(), [flag])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(reference="densee"), "unknown reference 'densee'.*did you mean 'dense'"),
        (dict(equal="params"), "unknown equal 'params': choose from parameters, macs"),
        (dict(columns=("errors",)), "unknown column 'errors'"),
        (dict(seeds=0), "seeds must be at least 1, got 0"),
        (dict(backbones={}), "backbones must not be empty"),
        (dict(backbones={"a": dict(config="x")}), "backbones.a lacks width, widths"),
        (dict(wirings=dict(expander=dict(kind="dense"))), "unknown field of wirings"),
        (dict(wirings={"expander": {}, "a/b": {}}), "'a/b' becomes a directory"),
    ],
)
def test_bad_studies_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        make_study(**fields)


def test_a_price_that_cannot_be_met_is_refused():
    with pytest.raises(
        ValueError,
        match=r"densenet dense at equal parameters .*reference expander, "
        r"width 8.*within 0%.*choose other widths of the reference, or raise",
    ):
        study_plan.expand(make_study(tolerance=0.001))


def test_a_net_that_cannot_be_built_is_refused():
    grouped = dict(net=dict(wiring=dict(kind="grouped", groups=3)))
    wirings = dict(expander=EXPANDER, grouped=grouped)
    with pytest.raises(ValueError, match=r"densenet grouped .*3"):
        study_plan.expand(make_study(wirings=wirings, equal="width"))


def test_every_run_belongs_to_one_shard():
    runs = list(range(7))
    shards = [study.shard(runs, f"{i}/3") for i in range(3)]
    assert sorted(itertools.chain(*shards)) == runs
    assert shards[1] == [1, 4]
    assert study.shard(runs, "") == runs


@pytest.mark.parametrize("which", ["3/3", "1", "0/0", "-1/2", "a/b"])
def test_bad_shards_are_refused(which):
    with pytest.raises(ValueError, match=f"--shard={which}: expected I/N"):
        study.shard([1, 2, 3], which)


@pytest.fixture
def trained(monkeypatch):
    """Replaces training by files of a finished run; yields the names of the runs."""
    names, finished = [], set()

    def fake(config, workdir):
        names.append(f"{workdir.parent.name}/{workdir.name}")
        if config.net.wiring.kind == "dense" and config.seed == 0:
            raise FloatingPointError("the loss is not finite")
        row = {"step": 4, "test_accuracy": 0.5 + config.seed / 10}
        workdir.mkdir(parents=True)
        (workdir / "metrics.csv").write_text(as_csv([row]))
        (workdir / "speed.csv").write_text(
            as_csv([{"step": 4, "images_per_second": 8}])
        )
        finished.add(workdir)
        return row | {"best_test_accuracy": row["test_accuracy"], "best_step": 4}

    monkeypatch.setattr(train, "train_and_evaluate", fake)
    monkeypatch.setattr(study, "is_finished", lambda run: run.workdir in finished)
    return names


def test_a_failed_run_is_named_and_does_not_stop_the_rest(tmp_path, trained):
    runs, lines = make_runs(make_study(equal="width"), tmp_path), []
    failures = study.train_all(runs, lines.append)
    reason = "FloatingPointError: the loss is not finite"
    assert failures == [f"densenet-dense-8/seed0: {reason}"]
    assert trained == [run.name for run in runs]
    assert lines[3].startswith("[4/4] densenet-dense-8/seed1: test error 40.00%, best ")


def test_finished_runs_are_not_repeated(tmp_path, trained):
    runs = make_runs(make_study(equal="width"), tmp_path)
    study.train_all(runs, str)
    trained.clear()
    study.train_all(runs, str)
    assert trained == ["densenet-dense-8/seed0"]  # it failed


def test_rows_have_the_results_of_finished_runs(tmp_path, trained):
    runs = make_runs(make_study(equal="width"), tmp_path)
    study.train_all(runs, str)
    rows = study.collect(runs)
    assert [row.final_error for row in rows] == [50.0, None, 40.0, 40.0]
    assert [row.finished for row in rows] == [True, False, True, True]
    assert rows[0].seconds_per_step == 4.0  # 32 images at 8 per second


def test_a_preempted_run_stops_the_study(tmp_path, monkeypatch):
    def preempted(config, workdir):
        raise processes.Preempted("SIGTERM")

    monkeypatch.setattr(train, "train_and_evaluate", preempted)
    runs = make_runs(make_study(equal="width"), tmp_path)
    with pytest.raises(processes.Preempted):
        study.train_all(runs, str)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_study_files_are_valid(path):
    for form in forms(path):
        the_study = study_plan.load(f"{path}{form}")
        assert the_study.seeds >= 3
        assert the_study.tolerance <= 0.02
    with pytest.raises(ValueError, match="form"):
        study_plan.load(f"{path}:larger")


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_study_files_meet_their_prices(path, monkeypatch):
    def count_parameters(net, _):
        """Returns the cost without the multiply-adds, which take half of the time."""
        leaves = jax.tree.leaves(nnx.state(cost.build(net), nnx.Param))
        return [cost.Cost(sum(x.size for x in leaves), 0, 0, 0)]

    monkeypatch.setattr(cost, "of", count_parameters)
    for form in forms(path):
        the_study = study_plan.load(f"{path}{form}")
        assert the_study.equal != "macs"
        for net in study_plan.expand(the_study):
            assert abs(net.remainder) <= 0.02


def forms(path):
    return [""] if path.stem == "digits" else [":small", ""]


def test_an_empty_workdir_is_refused(monkeypatch, capsys):
    # $UNSET in a script; otherwise the runs would go to the current directory.
    monkeypatch.setattr(
        sys, "argv", ["study", "configs/studies/digits.py", "--workdir="]
    )
    with pytest.raises(SystemExit):
        study.main()
    assert "--workdir must not be empty" in capsys.readouterr().err


def test_a_missing_study_names_the_nearest():
    with pytest.raises(ValueError, match=r"digit.py does not exist.*studies/digits.py"):
        study_plan.load("configs/studies/digit.py")


@pytest.mark.slow
def test_a_study_trains_and_resumes(tmp_path, monkeypatch, capsys):
    """One tiny study from the command line, in two shards, then once more."""
    file = tmp_path / "tiny.py"
    fields = dataclasses.asdict(make_study(equal="width", seeds=1))
    file.write_text(
        "from ml_collections import ConfigDict\n\n\n"
        f"def get_config():\n    return ConfigDict({fields!r})\n"
    )
    workdir = tmp_path / "W"

    def run(*flags):
        arguments = ["study.py", str(file), f"--workdir={workdir}", *flags]
        monkeypatch.setattr(sys, "argv", arguments)
        study.main()
        return capsys.readouterr().out

    assert "[1/1] densenet-dense-8/seed0: test error" in run("--shard=1/2")
    assert "0/1" in (workdir / "table.md").read_text()
    assert "[1/1] densenet-expander-8/seed0: test error" in run("--shard=0/2")
    table = (workdir / "table.md").read_text()
    assert "0/1" not in table
    out = run()
    assert out.count("finished earlier") == 2
    assert table in out
    rows = read_rows(workdir / "densenet-dense-8/seed0/metrics.csv")
    assert (workdir / "table.md").read_text() == table
    assert f"{100 * (1 - rows[-1]['test_accuracy']):.2f}" in table
    assert "finished" in run("--dry-run")


@pytest.mark.slow
def test_the_dry_run_estimates_from_measured_steps(capsys):
    run, _ = make_runs(make_study(equal="width", seeds=1), "/nowhere")
    found = study.estimate(run.config)
    assert found.steps == 5  # 0.1 epochs of 1,437 images in batches of 32
    assert found.seconds > found.steps * found.seconds_per_step > 0

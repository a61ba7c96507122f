"""python -m convert: from an original file to a workdir that works like any other."""

import hashlib
import json

import jax
import numpy as np
import pytest
from flax import nnx

import convert
import nets
import train
from configs import cfmz, gunn, igcnets, xdensenet
from convert import __main__ as command
from runtime import pretrained
from runtime.workdir import load_config, load_facts
from tests.support import weight_files

TINY = """
from configs import xdensenet

def get_config(argument=""):
    config = xdensenet.get_config("22-8-2,digits")
    config.net.update(depth=10, growth=4)
    return config
"""


@pytest.fixture(scope="module")
def tiny():
    config = xdensenet.get_config("22-8-2,digits")
    config.net.update(depth=10, growth=4)
    return config


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny):
    """A checkpoint of X-Nets and the config file of its net."""
    folder = tmp_path_factory.mktemp("files")
    state = weight_files.tensors(tiny.net, "xnets", "densenet_cifar")
    state = {f"module.{name}": tensor for name, tensor in state.items()}
    state = {k: v.astype(np.float32) for k, v in state.items()}
    content = {"state_dict": state, "best_prec1": 99.0, "optimizer": {"lr": 0.1}}
    (folder / "model.pth.tar").write_bytes(weight_files.torch_pickles(content))
    (folder / "tiny.py").write_text(TINY)
    return folder


def run(folder, *arguments):
    config = f"--config={folder / 'tiny.py'}"
    command.main([str(folder / "model.pth.tar"), config, *map(str, arguments)])


def expected_net(tiny):
    net = weight_files.build(tiny.net)
    state = weight_files.tensors(tiny.net, "xnets", "densenet_cifar")
    convert.load(net, state)
    return net


@pytest.mark.slow
def test_a_converted_run_is_restored_evaluated_and_resumed(tmp_path, files, tiny):
    workdir = tmp_path / "run"
    run(files, f"--workdir={workdir}")
    names = {path.name for path in workdir.iterdir()}
    assert names == {"checkpoints", "config.json", "origin.json"}  # no best.json
    net, preprocess = train.restore(workdir)
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    x = preprocess(images)
    np.testing.assert_array_equal(net(x), expected_net(tiny)(x))
    config = load_config(workdir)
    config.update_from_flattened_dict(
        {
            "data.pipeline": "device",
            "train.epochs": 0.05,
            "train.tensorboard": False,
            "train.compilation_cache": False,
        }
    )
    evaluated = train.evaluate_checkpoint(config, workdir)
    assert evaluated["step"] == 0
    result = train.train_and_evaluate(config, workdir)
    assert result["step"] > 0
    best = json.loads((workdir / "best.json").read_text())
    assert best["step"] == result["step"]  # of our training alone


def test_the_origin_is_recorded(tmp_path, files):
    workdir = tmp_path / "run"
    run(files, f"--workdir={workdir}")
    origin = json.loads((workdir / "origin.json").read_text())
    content = (files / "model.pth.tar").read_bytes()
    assert origin["file"] == "model.pth.tar"
    assert origin["sha256"] == hashlib.sha256(content).hexdigest()
    assert origin["container"] == "torch"
    assert origin["skipped"] == ["best_prec1", "optimizer"]
    facts = load_facts(workdir)
    assert facts.class_names == tuple("0123456789")
    assert (facts.mean, facts.num_train) == ((77.9,) * 3, 1437)
    before = sorted(workdir.rglob("*"))
    with pytest.raises(SystemExit, match=r"error: .*run already holds a run"):
        run(files, f"--workdir={workdir}")
    assert sorted(workdir.rglob("*")) == before


def test_a_dry_run_describes_the_file(tmp_path, files, capsys):
    run(files, "--dry-run", f"--workdir={files / 'new'}")
    out = capsys.readouterr().out
    assert "model.pth.tar: torch, " in out
    assert "skipped        best_prec1, optimizer" in out
    assert sorted(files.iterdir()) == [files / "model.pth.tar", files / "tiny.py"]


def test_fields_of_the_config_may_be_set(files, capsys):
    run(files, "--dry-run", "--config.net.growth=4", "--config.net.dropout=0.5")
    assert "tiny.py --config.net.growth=4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dry-run", "--config.net.growth=8"], "misshaped"),
        (["--dry-run", "--config.net.grwth=8"], "no field 'grwth'"),
        (["--dry-run", "--config.net.growth=x"], "growth=x"),
        (["--dry-run", "--nonsense"], "unknown flag '--nonsense'"),
        (["--dry-run", "--config.net.num_classes=0"], "at least 1 output, got 0"),
        (["--dry-run", "--config.seed=-1"], "seed must be at least 0"),
        (["--dry-run", "--config.data.std=(0.0,1.0,1.0)"], "3 positive numbers"),
        (["--dry-run", "--names=original"], "--names and --checkpoint require --to"),
        (["--workdir="], "--workdir must not be empty"),
        (["--workdir=gs://bucket/run"], "is a URL, not a directory"),
        ([], "--workdir is missing"),
        (["--dry-run=3"], "--dry-run: ignored explicit argument"),
    ],
)
def test_errors_are_one_line(files, arguments, message):
    with pytest.raises(SystemExit) as error:
        run(files, *arguments)
    assert str(error.value).startswith("error: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# Container: writer of tensors, original, family, fields of a small net.
SMALL = dict(depth=10, growth=4)
SEGMENTS = dict(channels=(16,), segments=(2,))
CONTAINERS = {
    "torch zip": (weight_files.torch_zip, "xnets/densenet_cifar", xdensenet, SMALL),
    "torch": (weight_files.torch_pickles, "xnets/densenet_cifar", xdensenet, SMALL),
    "npz": (weight_files.npz, "xnets/densenet_cifar", xdensenet, SMALL),
    "safetensors": (weight_files.safetensors, "xnets/densenet_cifar", xdensenet, SMALL),
    "MXNet": (weight_files.mxnet, "igcnets/plain_igc", igcnets, dict(depth=5)),
    "Torch7": (
        lambda tensors: weight_files.torch7(weight_files.module_tree(tensors)),
        *("gunn/gunn", gunn, SEGMENTS),
    ),
    "neon": (
        lambda tensors: weight_files.neon(tensors, (1, 1, 1)),
        *("cfmz/msra_resnet", cfmz, dict(depth=8)),
    ),
}


def spoil(tensors, kind):
    """Returns other tensors and a word of the error."""
    name, last = list(tensors)[-1], list(tensors.values())[-1]
    if kind == "not finite":
        return tensors | {name: np.full_like(last, np.nan)}, "not finite"
    if kind == "extra":
        return tensors | {"99.weight": last}, "unexpected: 99.weight"
    if kind == "missing":
        return {k: v for k, v in tensors.items() if k != name}, f"missing: {name}"
    return tensors, "misshaped: "  # another net


# The writer for neon takes whole nets; identify_test has one with other layers.
KINDS = [
    (container, kind)
    for container in CONTAINERS
    for kind in ("not finite", "extra", "missing", "another net")
    if container != "neon" or kind in ("not finite", "another net")
]


@pytest.mark.parametrize(("container", "kind"), KINDS)
def test_tensors_that_do_not_fit_are_one_line(tmp_path, container, kind):
    write, original, family, fields = CONTAINERS[container]
    config = family.get_config()
    config.net.update(fields)
    tensors = weight_files.tensors(config.net, *original.split("/"))
    tensors = {k: v.astype(np.float32) for k, v in tensors.items()}
    tensors, word = spoil(tensors, kind)
    (tmp_path / "weights").write_bytes(write(tensors))
    if kind == "another net":
        config.net.num_classes = 7
    overrides = {**fields, "num_classes": config.net.num_classes}
    flags = [f"--config.net.{k}={v}" for k, v in overrides.items()]
    flags.append(f"--config={family.__file__}")
    with pytest.raises(SystemExit) as error:
        command.main([str(tmp_path / "weights"), "--dry-run", *flags])
    message = str(error.value)
    assert message.startswith(f"error: {tmp_path / 'weights'}: ")
    assert word in message
    assert "\n" not in message


def test_a_directory_requires_to(files):
    with pytest.raises(SystemExit, match="is a directory: to export a run, set --to"):
        command.main([str(files), "--dry-run"])


def test_a_workdir_that_cannot_be_made_is_named(tmp_path, files):
    (tmp_path / "file").write_text("")
    for workdir, reason in (("file", "File exists"), ("file/run", "Not a directory")):
        with pytest.raises(
            SystemExit, match=rf"{workdir} cannot be written \({reason}"
        ):
            run(files, f"--workdir={tmp_path / workdir}")


@pytest.mark.parametrize("entry", ["origin.json", "config.json"])
def test_a_failed_write_leaves_nothing(tmp_path, files, entry):
    """A directory in the place of a draft stands for a full disk."""
    workdir = tmp_path / "run"
    (workdir / f".{entry}.draft").mkdir(parents=True)
    with pytest.raises(SystemExit, match=f"error: .*{entry} cannot be written"):
        run(files, f"--workdir={workdir}")
    assert [path.name for path in workdir.iterdir()] == [f".{entry}.draft"]


def test_errors_name_the_file(tmp_path, files):
    for name, content in {"empty": b"", "zip": b"PK\3\4", "text": b"hello"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SystemExit, match=f"error: .*{name}"):
            command.main([str(tmp_path / name), "--dry-run"])
    foreign = weight_files.npz({"a.weight": np.ones((2, 3))})
    (tmp_path / "foreign.npz").write_bytes(foreign)
    with pytest.raises(SystemExit, match=r"foreign\.npz: no variant .* 6 parameters"):
        command.main([str(tmp_path / "foreign.npz"), "--dry-run"])


def test_a_config_for_an_unknown_data_set_is_rejected(tmp_path, files):
    workdir = tmp_path / "run"
    with pytest.raises(SystemExit, match="data set 'mine' is unknown"):
        run(files, f"--workdir={workdir}", "--config.data.name=mine")
    assert not workdir.exists()


@pytest.fixture
def neon(tmp_path):
    """The tensors of a small net of cfmz, and the workdir of its neon file."""
    config = cfmz.get_config("20,cifar10")
    config.net.depth = 8
    (tmp_path / "tiny.py").write_text(
        "from configs import cfmz\n"
        "def get_config(_=''):\n"
        "    config = cfmz.get_config('20,cifar10')\n"
        "    config.net.depth = 8\n"
        "    return config\n"
    )
    tensors = weight_files.tensors(config.net, "cfmz", "msra_resnet")
    (tmp_path / "net.p").write_bytes(weight_files.neon(tensors, (1, 1, 1)))
    workdir = tmp_path / "run"
    flags = f"--config={tmp_path / 'tiny.py'}", f"--workdir={workdir}"
    command.main([str(tmp_path / "net.p"), *flags])
    return tensors, workdir


def test_a_net_of_neon_gets_its_means(neon):
    """neon 1.2.1 subtracts the mean of red from blue, and that of blue from red."""
    tensors, workdir = neon
    facts = load_facts(workdir)
    assert facts.mean == (113.9, 123.0, 125.3)
    assert facts.std == (1.0, 1.0, 1.0)
    assert facts.class_names[:2] == ("airplane", "automobile")
    net, _ = train.restore(workdir)
    wanted = weight_files.build(load_config(workdir).net)
    convert.load(wanted, tensors)
    assert_same(net, wanted)


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_a_net_of_neon_returns_from_an_export(tmp_path, neon, suffix):
    """With the original's names and with the means that neon has swapped."""
    _, workdir = neon
    path = tmp_path / "out" / f"net.{suffix}"
    command.main([str(workdir), f"--to={path}", "--names=original"])
    flags = f"--config={tmp_path / 'tiny.py'}", f"--workdir={tmp_path / 'again'}"
    command.main([str(path), *flags])
    assert load_facts(tmp_path / "again") == load_facts(workdir)
    assert_same(train.restore(tmp_path / "again")[0], train.restore(workdir)[0])


def assert_same(net, other):
    for (path, value), (_, wanted) in zip(
        nnx.to_flat_state(nnx.state(net, nnx.Param)),
        nnx.to_flat_state(nnx.state(other, nnx.Param)),
        strict=True,
    ):
        np.testing.assert_array_equal(value[...], wanted[...], err_msg=str(path))


@pytest.mark.slow
def test_a_run_starts_from_a_weight_file(tmp_path):
    """config.init_from=FILE converts it in a process of its own."""
    net = xdensenet.get_config("22-8-2,digits").net
    state = weight_files.tensors(net, "xnets", "densenet_cifar")
    path = tmp_path / "model.pth.tar"
    floats = {name: tensor.astype(np.float32) for name, tensor in state.items()}
    path.write_bytes(weight_files.torch_pickles({"state_dict": floats}))
    expected = weight_files.build(net)
    convert.load(expected, state)
    _, wanted = nets.split(expected)
    _, ours = nets.split(nets.create(net, nnx.Rngs(1)))
    jax.tree.map(
        np.testing.assert_array_equal, pretrained.initialize(ours, str(path)), wanted
    )

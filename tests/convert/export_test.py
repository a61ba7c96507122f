"""Exports: weights equal to the bit, a program that runs without us, and the card."""

import dataclasses
import errno
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from jax import export as jax_export

import convert
import nets
import train
from configs import xdensenet
from convert import __main__ as command_line
from convert import containers, export
from input_pipeline import Facts
from nets import cost
from runtime.checkpoints import Checkpoints
from runtime.command_line import load_config_file
from runtime.workdir import PATHS, as_csv, flatten, load_config, save_config, write_text
from tests.support import tiny, weight_files

STEP = 30
ROWS = [
    {"step": step, "epoch": step / 10, "test_loss": 1.5, "test_accuracy": accuracy}
    for step, accuracy in ((20, 0.25), (STEP, 0.625), (40, 0.5))
]
# Nets with millions of weights or many layers, however small their form, are slow.
LARGE = ["alexnet", "delugenet", "densenet_imagenet", "igc_resnet_imagenet", "vgg"]
EVERY_NET = pytest.mark.parametrize(
    "name",
    [
        pytest.param(x, marks=pytest.mark.slow if x in LARGE else ())
        for x in nets.names()
    ],
)
TINY = """
from configs import xdensenet

def get_config(argument=""):
    config = xdensenet.get_config("22-8-2,digits")
    config.net.update(depth=10, growth=4)
    return config
"""


def randomised(net, seed=0):
    """Sets random weights and statistics; the graphs are those of a seed."""
    rng = np.random.default_rng(seed)
    state = nnx.state(net, nnx.Any(nnx.Param, nnx.BatchStat))
    draw = lambda x: rng.uniform(0.5, 1.5, x.shape).astype(np.float32)
    nnx.update(net, jax.tree.map(draw, state))
    nets.configure(net, graph_seed=seed)
    return net


def values(net):
    kinds = nnx.Any(nnx.Param, nnx.BatchStat, nets.Connectivity)
    state = nnx.to_flat_state(nnx.state(net, kinds))
    return {path: np.asarray(variable[...]) for path, variable in state}


def assert_same(net, other):
    ours, theirs = values(net), values(other)
    assert ours.keys() == theirs.keys()
    for path, value in ours.items():
        assert value.dtype == theirs[path].dtype, path
        np.testing.assert_array_equal(value, theirs[path], err_msg=str(path))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of a tiny X-DenseNet on the digits: random weights, the second is best."""
    workdir = tmp_path_factory.mktemp("run")
    config = xdensenet.get_config("22-8-2,digits")
    config.net.update(depth=10, growth=4)
    config.update(seed=5)
    names = tuple("0123456789")
    facts = Facts(names, (32, 32, 3), (70.0, 80.0, 90.0), (60.0, 50.0, 40.0), 1437)
    _, state = train.create_train_state(config, facts)
    save_config(workdir, config, facts)
    with Checkpoints(workdir) as checkpoints:
        for row in ROWS:
            net = randomised(weight_files.build(config.net), row["step"])
            _, variables = nets.split(net)
            step = np.int32(row["step"])
            state = dataclasses.replace(state, step=step, **variables)
            checkpoints.save(row["step"], state, row)
    write_text(workdir / "metrics.csv", as_csv(ROWS))
    return workdir


@EVERY_NET
@pytest.mark.parametrize("names", ["ours", "original"])
@pytest.mark.parametrize("container", ["npz", "safetensors"])
def test_weights_of_every_net_return_to_the_bit(tmp_path, name, names, container):
    section = tiny.config(name, "expander")
    net = randomised(weight_files.build(section))
    tensors = export.tensors(net, names)
    writer = getattr(containers, container)
    (tmp_path / "file").write_bytes(writer.write(tensors))
    weights = containers.read(tmp_path / "file")
    assert weights.container == container
    assert list(weights.tensors) == list(tensors)
    other = weight_files.build(section)
    convert.load(other, weights.tensors)
    assert_same(net, other)


@pytest.mark.parametrize("library", ["numpy", "safetensors.numpy"])
def test_other_libraries_read_the_files(tmp_path, library):
    library = pytest.importorskip(library, reason=f"{library} is not installed")
    tensors = export.tensors(weight_files.build(tiny.config("densenet", "expander")))
    if library is np:
        (tmp_path / "net.npz").write_bytes(containers.npz.write(tensors))
        loaded = dict(np.load(tmp_path / "net.npz"))
    else:
        loaded = library.load(containers.safetensors.write(tensors))
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        np.testing.assert_array_equal(loaded[name], tensor, err_msg=name)


def test_the_original_has_its_names_and_layouts():
    net = randomised(weight_files.build(tiny.config("densenet", "expander")))
    tensors = export.tensors(net, "original")
    layer = net.blocks[0][0].conv2
    weight, mask = (tensors[f"block1.layer.0.conv2.{x}"] for x in ("fpWeight", "mask"))
    assert mask.sum() == layer.kernel[...].size
    dense = np.asarray(layer.dense(layer.kernel[...]))
    np.testing.assert_array_equal(weight, dense.transpose(3, 2, 0, 1))
    assert not weight[~mask].any()


def test_resnets_for_imagenet_have_the_names_of_pytorch():
    section = dict(name="resnet", depth=18, form="imagenet", shortcut="B")
    tensors = export.tensors(
        weight_files.build(section | {"num_classes": 2}), "original"
    )
    assert tensors["layer2.0.downsample.0.weight"].shape == (128, 64, 1, 1)
    assert {"conv1.weight", "bn1.running_mean", "fc.bias"} < tensors.keys()


@pytest.mark.parametrize("wiring", ["dense", "interleaved"])
def test_igcnets_have_the_names_of_their_symbol_files(wiring):
    section = tiny.config("igc_resnet_imagenet", wiring)
    tensors = export.tensors(weight_files.build(section), "original")
    name = {"dense": "g1_b1_conv1_weight", "interleaved": "g1_b1_conv1_conv1_weight"}
    assert name[wiring] in tensors
    assert ("g0_conv_weight" in tensors) == (wiring == "interleaved")


def test_a_net_without_an_original_has_our_names_only():
    net = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    assert export.tensors(net).keys() == {"scale", "bias", "mean", "var"}
    with pytest.raises(export.ExportError, match=r"no original names: .*BatchNorm"):
        export.tensors(net, "original")


@pytest.mark.parametrize("edges", [[-1, 2], [3, 2], [2, 2], [0, 10**6], [0.0, 1.0]])
def test_impossible_graphs_are_refused(edges):
    net = randomised(weight_files.build(tiny.config("densenet", "expander")))
    tensors = export.tensors(net)
    name = "blocks.0.0.conv1.edges"
    wrong = tensors[name].astype(np.asarray(edges).dtype)
    wrong[..., -2:] = edges
    with pytest.raises(convert.Mismatch, match=f"{name}: expected ascending"):
        convert.load(net, tensors | {name: wrong})


@pytest.mark.parametrize(
    "flags", [["--names=original"], pytest.param([], marks=pytest.mark.slow)]
)
def test_a_run_returns_through_the_command(tmp_path, workdir, flags):
    (tmp_path / "tiny.py").write_text(TINY)
    path = tmp_path / "out" / "net.safetensors"
    command_line.main([str(workdir), f"--to={path}", *flags])
    config = f"--config={tmp_path / 'tiny.py'}"
    command_line.main([str(path), f"--workdir={tmp_path / 'new'}", config])
    net, _ = train.restore(workdir, STEP)
    assert_same(net, train.restore(tmp_path / "new")[0])


@EVERY_NET
def test_every_net_is_exported_for_all_platforms_and_batches(name):
    config = xdensenet.get_config()
    net = weight_files.build(tiny.config(name, "expander"))
    shape = (tiny.image_size(name),) * 2 + (3,)
    facts = Facts((), shape, (0.0,) * 3, (1.0,) * 3, 1)
    program = jax_export.deserialize(export.program(net, config, facts))
    assert program.platforms == ("cpu", "cuda", "tpu")
    [images], [logits] = program.in_avals, program.out_avals
    assert (images.dtype, images.shape[1:]) == (np.uint8, shape)
    assert not isinstance(images.shape[0], int)  # symbolic
    assert logits.shape == (images.shape[0], 10)
    assert logits.dtype == np.float32


PROGRAM = """
import importlib.util, sys
import jax, jax.export, numpy
assert not any(map(importlib.util.find_spec, ("nets", "convert", "augment", "train")))
program = jax.export.deserialize(open(sys.argv[1], "rb").read())
images = numpy.load(sys.argv[2])
whole = program.call(images)
alone = [program.call(images[i : i + 1])[0] for i in (0, 1)]
numpy.save(sys.argv[3], [*whole, *alone])
assert not {"flax", "nets", "tensorflow"} & set(sys.modules)
"""


@pytest.mark.slow
def test_a_program_runs_without_this_project(tmp_path, workdir):
    path = tmp_path / "net.jax"
    assert export.export(workdir, path) == [path, tmp_path / "README.md"]
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    np.save(tmp_path / "images.npy", images)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run(
        [sys.executable, "-c", PROGRAM, path, "images.npy", "logits.npy"],
        cwd=tmp_path,
        env=environment | {"JAX_PLATFORMS": "cpu"},
        check=True,
    )
    net, preprocess = train.restore(workdir)
    expected = np.asarray(net(preprocess(images)))
    logits = np.load(tmp_path / "logits.npy")
    np.testing.assert_allclose(
        logits, np.concatenate([expected, expected[:2]]), rtol=1e-4, atol=1e-4
    )


def test_the_card_is_made_from_the_workdir(tmp_path, workdir):
    _, path = export.export(workdir, tmp_path / "net.npz", names="original")
    card = path.read_text()
    config = load_config(workdir)
    counts = cost.total(cost.of(config.net, (32, 32, 3)))
    for fact in (
        "# densenet for digits\n",
        "| net | densenet: ",
        "depth=10, ",
        "| wiring | expander compress=2 ",
        f"| parameters | {counts.parameters:,} (dense: {counts.dense_parameters:,})",
        f"| multiply-adds | {counts.macs:,} per image",
        "1,437 training images of 32x32x3, 10 classes",
        "mean (70, 80, 90), std (60, 50, 40)",
        "| seeds | 5, of the graphs 0 |",
        "step 30, epoch 3: test_loss=1.5000, test_accuracy=0.6250; best of 3 eval",
        "the last has test_accuracy=0.5000",
        'numpy.load("net.npz")',
        "0, 1, 2, 3, 4, 5, 6, 7, 8, 9",
        f"JAX {jax.__version__}",
    ):
        assert fact in card
    assert str(workdir) not in card
    assert "beta1" not in card  # a field of AdamW, which this run does not use


def test_the_command_of_the_card_is_the_configuration(workdir):
    config = load_config(workdir)
    words = shlex.split(export.command(config))
    assert words[:2] == ["python", "main.py"]
    found = load_config_file(words[2].removeprefix("--config="))
    for word in words[3:-1]:
        field, value = re.fullmatch(r"--config\.([\w.]+)=(.*)", word).groups()
        found.update_from_flattened_dict({field: int(value)})
    assert words[2].endswith("configs/xdensenet.py:22-8-2,digits,faithful")
    ours, theirs = flatten(config), flatten(found)
    assert {k: v for k, v in ours.items() if k not in PATHS} == {
        k: v for k, v in theirs.items() if k not in PATHS
    }


def test_the_card_of_another_checkpoint(tmp_path, workdir):
    _, path = export.export(workdir, tmp_path / "net.npz", which="last")
    assert "step 40, epoch 4: test_loss=1.5000" in path.read_text()
    assert "not the best of 3 evaluations" in path.read_text()


@pytest.mark.parametrize(
    ("to", "flags", "message"),
    [
        ("net.onnx", [], "must end in .npz, .safetensors, .jax"),
        ("net.jax", ["--names=original"], "--names=original is for weights"),
        ("net.npz", ["--checkpoint=7"], "'7'.*available"),
        ("net.npz", ["--workdir=x"], "--to cannot be combined with --workdir"),
        ("net.npz", ["--names=theirs"], "invalid choice: 'theirs'"),
        ("mine/net.npz", [], "README.md exists and is not a model card"),
    ],
)
def test_errors_are_one_line_and_write_nothing(tmp_path, workdir, to, flags, message):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("My own text.")
    with pytest.raises(SystemExit, match=f"^error: .*{message}") as error:
        command_line.main([str(workdir), f"--to={tmp_path / to}", *flags])
    assert "\n" not in str(error.value)
    assert not (tmp_path / to).exists()
    assert (tmp_path / "mine" / "README.md").read_text() == "My own text."


def test_a_failed_write_leaves_nothing(tmp_path, workdir):
    """A directory in the place of the draft stands for a full disk."""
    draft = tmp_path / ".net.npz.draft"
    draft.mkdir()
    with pytest.raises(SystemExit, match=r"error: .*net\.npz cannot be written: Is a"):
        command_line.main([str(workdir), f"--to={tmp_path / 'net.npz'}"])
    assert [*tmp_path.iterdir()] == [draft]


def test_a_failed_write_leaves_no_new_folder(tmp_path, workdir, monkeypatch):
    def fail(path, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(export, "write_text", fail)  # of the model card
    with pytest.raises(export.ExportError, match=r"net\.npz cannot be written: No sp"):
        export.export(workdir, tmp_path / "new" / "net.npz")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("origin.json", "{", "origin.json is damaged"),
        ("origin.json", "{}", "origin.json is damaged"),
        ("metrics.csv", "step\nx\n", "metrics.csv is damaged"),
    ],
)
def test_a_damaged_workdir_writes_nothing(tmp_path, workdir, name, content, message):
    copy, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(workdir, copy)
    (copy / name).write_text(content)
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        command_line.main([str(copy), f"--to={out / 'net.npz'}"])
    assert not out.exists()


def test_a_run_of_another_version_is_named(tmp_path, workdir):
    config = json.loads((workdir / "config.json").read_text())
    del config["train"]["ema"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match=r"error: .*train\.ema"):
        command_line.main([str(tmp_path), f"--to={tmp_path / 'out' / 'net.jax'}"])
    assert not (tmp_path / "out").exists()


def test_a_directory_without_a_run_is_named(tmp_path):
    with pytest.raises(
        SystemExit, match=f"error: {tmp_path}/config.json does not exist"
    ):
        command_line.main([str(tmp_path), f"--to={tmp_path / 'net.npz'}"])

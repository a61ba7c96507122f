"""From a weight file to the net of a variant, for the files of all originals."""

import jax
import numpy as np
import pytest
from flax import nnx

import convert
from configs import cfmz, delugenets, fb_resnet, gunn, igcnets, xdensenet
from convert import containers, identify
from tests.support import weight_files
from tests.support.weight_files import layer, sequence

RELU = sequence(kind="cudnn.ReLU")
IDENTITY = sequence(kind="nn.Identity")


def config_of(family, argument="", **fields):
    config = family.get_config(argument)
    config.net.update(fields)
    return config


def values(net):
    return {path: np.asarray(x[...]) for path, x in nnx.to_flat_state(nnx.state(net))}


def assert_same(net, other):
    ours, wanted = values(net), values(other)
    assert ours.keys() == wanted.keys()
    for path, value in wanted.items():
        np.testing.assert_array_equal(ours[path], value, err_msg=str(path))


def identified(tmp_path, content, config):
    path = tmp_path / "file"
    path.write_bytes(content)
    tensors = containers.read(path).tensors
    return identify.identify(tensors, ("tiny.py", config)).net


def loaded(section, tensors):
    net = weight_files.build(section)
    convert.load(net, tensors)
    return net


# Torch7: the trees of modules that the Lua files build


def residual_tree(tensors, blocks, preactivation):
    """fb.resnet.torch for CIFAR with shortcuts of type B."""

    def conv(name):
        return layer("cudnn.SpatialConvolution", name, tensors)

    def norm(name):
        return layer("cudnn.SpatialBatchNormalization", name, tensors)

    def post(name, projected):
        shortcut = IDENTITY
        if projected:
            parts = conv(f"{name}.shortcut.conv"), norm(f"{name}.shortcut.bn")
            shortcut = sequence(*parts)
        branch = [conv(f"{name}.conv1"), norm(f"{name}.bn1"), RELU]
        branch += [conv(f"{name}.conv2"), norm(f"{name}.bn2")]
        table = sequence(sequence(*branch), shortcut, kind="nn.ConcatTable")
        return sequence(table, sequence(kind="nn.CAddTable"), RELU)

    def pre(name, first, projected):
        head = [norm(f"{name}.bn0"), RELU]
        branch = [conv(f"{name}.conv1"), norm(f"{name}.bn1"), RELU]
        branch += [conv(f"{name}.conv2")]
        shortcut = sequence(conv(f"{name}.shortcut.conv")) if projected else IDENTITY
        inner = branch if first else head + branch
        table = sequence(sequence(*inner), shortcut, kind="nn.ConcatTable")
        return sequence(*(head if first else []), table, sequence(kind="nn.CAddTable"))

    def stage(s):
        names = [(f"layer{s}.{i}", i == 0, s > 1 and i == 0) for i in range(blocks)]
        if preactivation:
            return sequence(*(pre(*x) for x in names))
        return sequence(*(post(name, projected) for name, _, projected in names))

    start = [conv("conv1")] + ([] if preactivation else [norm("bn1"), RELU])
    end = [norm("bn_last"), RELU] if preactivation else []
    linear = layer("nn.Linear", "fc", tensors)
    return sequence(*start, *(stage(s) for s in (1, 2, 3)), *end, linear)


@pytest.mark.parametrize("preactivation", [False, True])
def test_fb_resnet(tmp_path, preactivation):
    fields = dict(depth=14, shortcut="B", preactivation=preactivation)
    config = config_of(fb_resnet, "resnet-20", **fields)
    name = "preresnet" if preactivation else "resnet"
    tensors = weight_files.tensors(config.net, "resnet", name)
    tree = residual_tree(tensors, 2, preactivation)
    content = weight_files.torch7(tree)
    assert_same(identified(tmp_path, content, config), loaded(config.net, tensors))


def deluge_tree(tensors, layers):
    """DelugeNet for CIFAR; the last unit of a block is its transition to the next."""

    def conv(name):
        return layer("cudnn.SpatialConvolution", name, tensors)

    def norm(name):
        return layer("cudnn.SpatialBatchNormalization", name, tensors)

    def cross(name):
        kind, fields = layer("nn.CrossLayerDepthwiseConvolution", name, tensors)
        shared = norm("block1.layer1.bn1")  # a work space, not weights
        return type(shared)((kind, fields | {"modules": {1: shared}}))

    def unit(name, first):
        parts = (
            [] if f"{name}.cross.weight" not in tensors else [cross(f"{name}.cross")]
        )
        for i in (1, 2, 3):
            parts += [norm(f"{name}.bn{i}"), RELU, conv(f"{name}.conv{i}")]
        if first:
            return sequence(sequence(*parts))
        table = sequence(sequence(*parts), IDENTITY, kind="nn.ConcatTable")
        return sequence(table, sequence(kind="nn.FlattenTable"))

    def block(b, count):
        units = [unit(f"block{b}.layer{i + 1}", b == i + 1 == 1) for i in range(count)]
        if b > 1:
            name = f"block{b}.trans"
            parts = cross(f"{name}.cross"), norm(f"{name}.bn"), conv(f"{name}.conv")
            units.insert(0, sequence(sequence(*parts)))
        return sequence(*units)

    blocks = [block(b, count) for b, count in enumerate(layers, start=1)]
    end = [cross("head.cross"), norm("head.bn"), RELU]
    linear = layer("nn.Linear", "head.fc", tensors)
    return sequence(conv("stem.conv"), *blocks, *end, linear)


def test_delugenets(tmp_path):
    """Readers of one map may have different statistics; evaluation stays the same."""
    layers = (2, 3)
    config = config_of(delugenets, "146", layers=layers, width=0.25)
    tensors = weight_files.tensors(config.net, "delugenets", "delugenet")
    content = weight_files.torch7(deluge_tree(tensors, layers))
    assert_same(identified(tmp_path, content, config), loaded(config.net, tensors))


def test_equal_statistics_leave_a_delugenet_unchanged_to_the_bit():
    config = config_of(delugenets, "146", layers=(2, 3), width=0.25)
    tensors = weight_files.tensors(config.net, "delugenets", "delugenet")
    for name in tensors:
        if "cross.running" in name:
            tensors[name] = np.full_like(tensors[name], 0.3)
    net = weight_files.build(config.net)
    net.train()
    convert.load(net, tensors)
    evaluated = loaded(config.net, tensors)
    assert_same(evaluated, net)


def test_gunn(tmp_path):
    """The names of the tensors are their positions."""
    fields = dict(channels=(16, 24), segments=(4, 3))
    config = config_of(gunn, "15", **fields)
    tensors = weight_files.tensors(config.net, "gunn", "gunn")
    content = weight_files.torch7(weight_files.module_tree(tensors))
    assert_same(identified(tmp_path, content, config), loaded(config.net, tensors))


def test_linear_layouts_of_older_torch7_modules(tmp_path):
    """nn.SpatialConvolutionMM stores its kernel as a matrix."""
    config = config_of(fb_resnet, "resnet-20", depth=8, shortcut="B")
    tensors = weight_files.tensors(config.net, "resnet", "resnet")
    flat = {k: v.reshape(len(v), -1) if v.ndim == 4 else v for k, v in tensors.items()}
    content = weight_files.torch7(residual_tree(flat, 1, False))
    assert_same(identified(tmp_path, content, config), loaded(config.net, tensors))


# The other originals


def test_cfmz(tmp_path):
    config = config_of(cfmz, "20", depth=14)
    tensors = weight_files.tensors(config.net, "cfmz", "msra_resnet")
    content = weight_files.neon(tensors, (2, 2, 2))
    assert_same(identified(tmp_path, content, config), loaded(config.net, tensors))


def test_igcnets_without_a_config(tmp_path):
    config = igcnets.get_config("plain-8-L24M2,cifar10")
    tensors = weight_files.tensors(config.net, "igcnets", "plain_igc")
    path = tmp_path / "plain-0400.params"
    statistics = ("moving_mean", "moving_var")
    content = {
        ("aux:" if name.endswith(statistics) else "arg:") + name: tensor
        for name, tensor in tensors.items()
    }
    path.write_bytes(weight_files.mxnet(content, 0))
    match = identify.identify(containers.read(path).tensors)
    assert match.name == "configs/igcnets.py:plain-8-L24M2,cifar10"
    assert match.others == ("configs/igcnets.py:plain-8-L24M2,svhn_cropped_extra",)
    assert_same(match.net, loaded(config.net, tensors))


EXPANDER = xdensenet.get_config("22-8-2,digits")


@pytest.fixture(scope="module")
def expander():
    return weight_files.tensors(EXPANDER.net, "xnets", "densenet_cifar")


@pytest.mark.parametrize("write", ["torch_zip", "torch_pickles", "npz", "safetensors"])
def test_x_nets_without_a_config(tmp_path, expander, write):
    """The graph follows the masks."""
    path = tmp_path / "file"
    content = {k: v.astype(np.float32) for k, v in expander.items()}
    path.write_bytes(getattr(weight_files, write)(content))
    match = identify.identify(containers.read(path).tensors)
    assert match.name == "configs/xdensenet.py:22-8-2,digits"
    assert match.others == ()
    assert_same(match.net, loaded(EXPANDER.net, expander))


def test_names_and_shapes_distinguish_equal_counts():
    """resnet-20, preresnet-20 and IGCNet's plain-20-W16 have 269,722 parameters."""
    names = {name for name, _ in identify.candidates(269_722)}
    assert {"configs/fb_resnet.py:resnet-20,cifar10"} < names
    config = fb_resnet.get_config("preresnet-20,cifar10")
    tensors = weight_files.tensors(config.net, "resnet", "preresnet")
    match = identify.identify(tensors)
    assert match.name == "configs/fb_resnet.py:preresnet-20,cifar10"


@pytest.mark.parametrize(
    ("system", "name", "config"),
    [
        ("cfmz", "msra_resnet", config_of(cfmz, "20", depth=8)),
        ("delugenets", "delugenet", config_of(delugenets, layers=(2, 3), width=0.25)),
        ("gunn", "gunn", config_of(gunn, channels=(16, 24), segments=(4, 3))),
        ("igcnets", "plain_igc", config_of(igcnets, "plain-8-L4M8")),
        ("resnet", "resnet", config_of(fb_resnet, "resnet-20", depth=8)),
        ("xnets", "densenet_cifar", EXPANDER),
    ],
)
def test_parameters_are_counted_as_our_nets_store_them(system, name, config):
    tensors = weight_files.tensors(config.net, system, name)
    net = weight_files.build(config.net)
    stored = sum(x.size for x in jax.tree.leaves(nnx.state(net, nnx.Param)))
    assert identify.count_parameters(tensors) == stored


# What does not fit


def refused(tensors, given=None):
    with pytest.raises(identify.Unidentified) as error:
        identify.identify(tensors, given)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 700
    return str(error.value)


def test_a_config_that_does_not_fit_names_the_one_that_does(expander):
    config = xdensenet.get_config("22-8-2,digits")
    config.net.wired_transitions = False
    message = refused(expander, ("mine.py", config))
    assert "do not fit mine.py" in message
    assert "net.wired_transitions=True (not False)" in message
    assert "use --config=configs/xdensenet.py:22-8-2,digits" in message
    message = refused(expander, ("other.py", igcnets.get_config("plain-8-W16")))
    assert "net.name='densenet' (not 'plain')" in message


def test_a_missing_tensor_is_named(expander):
    tensors = dict(expander)
    del tensors["trans1.bn1.running_var"]
    message = refused(tensors)  # has the parameters of a variant
    assert "not fit configs/xdensenet.py:22-8-2,digits: " in message
    assert "missing: trans1.bn1.running_var" in message
    del tensors["fc.weight"]
    message = refused(tensors)  # has another number of parameters
    assert "no variant in configs/" in message
    assert "the nearest, configs/xdensenet.py:22-8-2,digits, has 17,418" in message
    assert "missing: fc.weight" in refused(tensors, ("x.py", EXPANDER))


def test_an_extra_tensor_is_named(expander):
    tensors = expander | {"extra.weight": np.ones(3, np.float32)}
    assert "unexpected: extra.weight" in refused(tensors, ("x.py", EXPANDER))


def test_a_wrong_shape_is_named(expander):
    tensors = expander | {"fc.weight": expander["fc.weight"].T}
    assert "misshaped: fc.weight" in refused(tensors, ("x.py", EXPANDER))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_rejected(expander, value):
    tensors = expander | {"fc.bias": np.full(10, value, np.float32)}
    assert "fc.bias has values that are not finite" in refused(tensors)


def test_numbers_beyond_float32_are_rejected(expander):
    tensors = expander | {"fc.bias": np.full(10, 1e300)}
    assert "fc.bias has values that are not finite in float32" in refused(tensors)


@pytest.mark.parametrize(
    "dtype", [np.int64, np.complex64, np.longdouble, "U1", "S1", "M8[s]", "V4", bool]
)
def test_other_types_are_rejected(expander, dtype):
    tensors = expander | {"fc.bias": np.zeros(10, dtype)}
    assert f"fc.bias has type {np.dtype(dtype)}, but" in refused(tensors)


def test_negative_variances_are_rejected(expander):
    tensors = expander | {"bn1.running_var": -expander["bn1.running_var"]}
    assert "bn1.running_var has negative variances" in refused(tensors)


@pytest.mark.parametrize("value", [np.nan, 0.5, -1, "1"])
def test_a_mask_holds_zeros_and_ones(expander, value):
    mask = np.where(expander["trans1.conv1.mask"], value, type(value)(0))
    message = refused(expander | {"trans1.conv1.mask": mask})
    assert "trans1.conv1.mask has values other than 0 and 1" in message


def test_another_graph_is_rejected(expander):
    """A mask with fewer connections is another net."""
    tensors = dict(expander)
    mask = tensors["trans1.conv1.mask"].copy()
    mask[:, 0] = 0
    tensors["trans1.conv1.mask"] = mask
    message = refused(tensors, ("x.py", EXPANDER))
    assert "trans1.conv1.mask: the mask has" in message


def test_a_foreign_net_is_rejected():
    tensors = {"bert.embeddings.weight": np.ones((3, 4), np.float32)}
    message = refused(tensors)
    assert "these 12 parameters (bert.embeddings.weight)" in message
    assert "missing" in refused(tensors, ("x.py", EXPANDER))


def test_a_file_of_another_number_of_layers_is_rejected(tmp_path):
    config = config_of(fb_resnet, "resnet-20", depth=8, shortcut="B")
    tensors = weight_files.tensors(config.net, "resnet", "resnet")
    content = weight_files.torch7(residual_tree(tensors, 1, False))
    config.net.depth = 14
    path = tmp_path / "file"
    path.write_bytes(content)
    message = refused(containers.read(path).tensors, ("x.py", config))
    assert "19 layers with weights, but the net has 31" in message


def test_float64_weights_become_float32(expander):
    doubles = {k: v.astype(np.float64) for k, v in expander.items()}
    net = identify.identify(doubles).net
    kinds = {x.dtype for x in jax.tree.leaves(nnx.state(net, nnx.Param))}
    assert kinds == {np.dtype(np.float32)}

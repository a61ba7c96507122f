"""Loading tensors by original names: completeness, layouts, precision and errors."""

import pathlib

import jax
import numpy as np
import pytest
from flax import nnx

import convert
import nets
from convert.sources import tensor_shapes, to_reference
from nets.layers.expander import Expander
from tests.support.golden_files import Golden, GoldenError, draw_graph

EXPANDER = {
    "system": "xnets",
    "net": "densenet_cifar",
    "config": dict(
        depth=10, growth=4, num_classes=10, wiring="expander", expander_transitions=True
    ),
    "batch_norm": {"eps": 1e-5, "keep": 0.9, "running_var": "unbiased"},
}


def state_dict(net, seed=0):
    """Returns random tensors for all original names; masks fit the net."""
    rng = np.random.default_rng(seed)
    sources = convert.find("xnets", "densenet_cifar").sources(net)
    tensors = {
        name: rng.standard_normal(shape).astype(np.float32)
        for name, shape in tensor_shapes(sources).items()
    }
    nets.configure(net, graph_seed=seed)
    edges = {
        (*path, "edges"): np.asarray(module.edges[...])
        for path, module in nnx.iter_modules(net)
        if isinstance(module, Expander)
    }
    return tensors | to_reference(sources, edges)


@pytest.fixture(scope="module")
def tensors():
    return state_dict(convert.build(EXPANDER))


def test_a_loaded_net_returns_its_tensors(tensors):
    """Weights of connections that do not exist are zero."""
    net = convert.build(EXPANDER)
    convert.load(net, tensors)
    values = {
        path: np.asarray(variable[...])
        for path, variable in nnx.to_flat_state(nnx.state(net))
    }
    sources = convert.find("xnets", "densenet_cifar").sources(net)
    returned = to_reference(sources, values)
    assert set(returned) == set(tensors)
    for name, tensor in tensors.items():
        mask = tensors.get(name.removesuffix("fpWeight") + "mask", 1)
        expected = tensor * mask if name.endswith("fpWeight") else tensor
        np.testing.assert_array_equal(returned[name], expected, err_msg=name)


def test_original_names_and_layouts(tensors):
    weight, mask = (tensors[f"block2.layer.0.conv2.{x}"] for x in ("fpWeight", "mask"))
    assert weight.shape == mask.shape == (4, 16, 3, 3)
    net = convert.build(EXPANDER)
    convert.load(net, tensors)
    layer = net.blocks[1][0].conv2
    dense = np.asarray(layer.dense(layer.kernel[...]))
    np.testing.assert_array_equal(dense, (weight * mask).transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(
        net.classifier.kernel[...], tensors["fc.weight"].transpose()
    )


def test_variables_have_the_precision_of_the_tensors(tensors):
    for precision in (np.float16, np.float32, np.float64):
        with jax.enable_x64(True):
            net = convert.build(EXPANDER)
            convert.load(net, {k: v.astype(precision) for k, v in tensors.items()})
            kinds = {x.dtype for x in jax.tree.leaves(nnx.state(net, nnx.Param))}
            edges = net.blocks[0][0].conv1.edges[...]
        assert kinds == {np.promote_types(precision, np.float32)}
        assert edges.dtype == np.int32


def test_an_error_lists_all_tensors_that_do_not_fit(tensors):
    wrong = dict(tensors)
    del wrong["conv1.weight"], wrong["block1.layer.0.conv1.mask"]
    wrong["fc.weight"] = wrong["fc.weight"].T
    wrong["extra.weight"] = np.zeros(3)
    with pytest.raises(convert.Mismatch) as error:
        convert.load(convert.build(EXPANDER), wrong)
    _, *lines = str(error.value).split("\n")
    assert list(map(str.strip, lines)) == [
        "missing: block1.layer.0.conv1.mask, conv1.weight",
        "unexpected: extra.weight",
        "misshaped: fc.weight (9, 10), expected (10, 9)",
    ]


def test_a_failed_load_leaves_the_net_unchanged(tensors):
    net = convert.build(EXPANDER)
    wrong = tensors | {"trans2.conv1.mask": np.ones_like(tensors["trans2.conv1.mask"])}
    with pytest.raises(convert.Mismatch, match=r"trans2\.conv1\.mask: .* 50 conn"):
        convert.load(net, wrong)
    assert not any(np.any(np.asarray(x)) for x in jax.tree.leaves(nnx.state(net)))


def test_a_mask_that_differs_between_taps_is_rejected(tensors):
    name = "block1.layer.0.conv2.mask"
    mask = tensors[name].copy()
    mask[0, :, 0, 0] ^= True
    with pytest.raises(convert.Mismatch, match=f"{name}: .*kernel taps"):
        convert.load(convert.build(EXPANDER), tensors | {name: mask})


@pytest.mark.parametrize(
    ("field", "value"), [("eps", 1e-3), ("keep", 0.99), ("running_var", "biased")]
)
def test_other_batch_norm_conventions_are_rejected(field, value):
    reference = EXPANDER | {"batch_norm": EXPANDER["batch_norm"] | {field: value}}
    with pytest.raises(ValueError, match=f"{field} is .* here and '?{value}'? in"):
        convert.build(reference)


def test_an_unknown_reference_error_names_the_nearest():
    with pytest.raises(
        convert.UnknownReference, match=r"densenet_cifr: .*did you mean"
    ):
        convert.build(EXPANDER | {"net": "densenet_cifr"})
    with pytest.raises(convert.UnknownReference, match="cannot convert this Dropout"):
        convert.load(nnx.Dropout(0.5), {})


def test_an_unknown_field_of_a_reference_is_rejected():
    config = EXPANDER["config"] | {"mystery": 1}
    with pytest.raises(ValueError, match=r"no field .*mystery"):
        convert.build(EXPANDER | {"config": config})


def test_a_graph_that_differs_from_the_recorded_one_is_rejected():
    facts = dict(sampled_side="output", degree=2, nonzeros=8, mask_crc32=0)
    with pytest.raises(GoldenError, match=r"drew \(nonzeros, crc32\) .* recorded"):
        draw_graph("model/name", (4, 6), facts)


def test_another_format_is_rejected(tmp_path: pathlib.Path):
    path = tmp_path / "old.json"
    path.write_text('{"format": 1}')
    with pytest.raises(GoldenError, match=r"old.json: expected format 2, got 1"):
        Golden.read(path)


# IGCNets

IGC10 = dict(stem=8, stage_channels=[16, 32, 64, 128], depth=10, num_classes=10)


@pytest.mark.parametrize(
    ("config", "wiring"),
    [
        (
            IGC10 | dict(primary_partitions=[8, 16, 32, 64]),
            dict(kind="interleaved", primary_groups=0, secondary_groups=2),
        ),
        (
            IGC10 | dict(stem=16, primary_partitions=[4] * 4),
            dict(kind="interleaved", primary_groups=4, secondary_groups=0),
        ),
    ],
)
def test_either_primary_or_secondary_groups_double(config, wiring):
    section = convert.find("igcnets", "resnet_igc_imagenet").section(config)
    assert section["wiring"] == wiring
    assert section["expand_first_stage"] == (wiring["primary_groups"] == 0)
    reference = dict(system="igcnets", net="resnet_igc_imagenet", config=config)
    stages = convert.build(reference).stages
    primary = [stage[0].block1.conv.secondary.groups[0] for stage in stages]
    assert primary == config["primary_partitions"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(primary_partitions=[4, 4, 8, 8]), "must be equal in all stages"),
        (dict(stem=12), "no IGCNet builder"),
        (dict(blocks_per_stage=[3, 4, 6, 3]), "no IGCNet builder"),
    ],
)
def test_stages_that_no_builder_supports_are_rejected(fields, message):
    section = convert.find("igcnets", "resnet_igc_imagenet").section
    with pytest.raises(ValueError, match=message):
        section(IGC10 | fields)


@pytest.mark.parametrize(
    ("net", "primary", "block"),
    [
        ("resnet_igc_imagenet", [4] * 4, "g2_b1_conv1_conv2_weight"),
        ("resnet_igc_imagenet_builder", [4] * 4, "g2_b1_igc1_conv2_weight"),
        ("resnet_imagenet_mx", None, "g2_b1_proj_weight"),
    ],
)
def test_each_naming_of_a_net_is_recognised(net, primary, block):
    """Symbol files and the Python builder name the tensors of one net differently."""
    config = IGC10 | dict(stem=16, primary_partitions=primary)
    built = convert.build(dict(system="igcnets", net=net, config=config))
    sources = convert.find("igcnets", net).sources(built)
    shapes = tensor_shapes(sources)
    assert block in shapes
    convert.load(built, {k: np.full(v, 3.0) for k, v in shapes.items()})
    params = jax.tree.leaves(nnx.state(built, nnx.Param))
    assert all(np.all(np.asarray(x) == 3) for x in params)
    assert convert.find_sources(built, shapes).keys() == sources.keys()

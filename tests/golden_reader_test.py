"""The readers of layer files of which none is stored; each test records one."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from convert.sources import TORCH_LEAVES, by_layer
from nets import connectivity
from nets.layers.norm import BatchNorm
from nets.layers.wiring import Wiring
from nets.plain import MxBatchNorm, Unit
from tests.support import golden_igcnets, golden_layers
from tests.support.compiling import run_once
from tests.support.golden_checks import ROUNDED, Comparison, train
from tests.support.golden_files import (
    channels_first,
    channels_last,
    draw,
    generator,
    normal,
)

MODEL, KEEP = "layer_resunit_img_test", 0.9
# Names of the blocks, and suffixes of the convolutions in a block, by origin.
NAMES = {
    "symbols": (("conv1", "conv2", "proj"), ("_conv1", "_conv2", "_conv")),
    "builder": (("igc1", "igc2", "proj"), ("_conv1", "_conv2", "_conv")),
    "regular": (("conv1", "conv2", "proj"), ("", "", "")),
}


def record(folder, origin: str, in_channels: int, stride: int):
    """Records an ImageNet unit of 8 channels under the names of its origin."""
    blocks, members = NAMES[origin]
    pair = origin != "regular"
    wiring = Wiring("interleaved", primary_groups=2) if pair else Wiring()
    norm = lambda size: MxBatchNorm(size, keep=KEEP)
    unit = Unit(in_channels, 8, stride, norm=norm, wiring=wiring, rngs=nnx.Rngs(0))
    variables, convs, arrays = {}, [], {}

    def add(name, variable, kind):
        shape = variable.shape
        if kind == "weight":  # (out, in, rows, columns) in the file
            shape = (shape[3], shape[2], *shape[:2])
        value = draw(f"{MODEL}/{name}", shape, kind)
        moved = np.transpose(value, (2, 3, 1, 0)) if kind == "weight" else value
        variable.set_value(jax.numpy.asarray(moved))
        variables[name] = (variable, kind)

    parts = [p for p in (unit.block1, unit.block2, unit.shortcut) if p is not None]
    for block, part in zip(blocks, parts, strict=False):
        layers = [(members[2] if block == "proj" else "", part.conv)]
        if pair and block != "proj":
            layers = [
                (members[0], part.conv.primary),
                (members[1], part.conv.secondary),
            ]
        for member, conv in layers:
            name = f"blk_{block}{member}"
            add(f"{name}_weight", conv.kernel, "weight")
            window, depth = conv.kernel.shape[:2], conv.kernel.shape[2]
            widened = part is unit.block2 or member == "_conv2"
            groups = (8 if widened else in_channels) // depth
            facts = dict(groups=groups, stride=str((stride, stride)))
            convs.append(dict(name=name, kernel=str(window), **facts))
        add(f"blk_{block}_bn_gamma", part.norm.scale, "gamma")
        add(f"blk_{block}_bn_beta", part.norm.bias, "bias")
        add(f"blk_{block}_bn_moving_mean", part.norm.mean, "mean")
        add(f"blk_{block}_bn_moving_var", part.norm.var, "var")

    shapes = {
        "input": (2, in_channels, 8, 8),
        "output": (2, 8, 8 // stride, 8 // stride),
    }
    x = channels_last(normal(f"{MODEL}/input", shapes["input"]))
    upstream = channels_last(normal(f"{MODEL}/head_grad", shapes["output"]))
    unit.eval()
    graphdef, state = nnx.split(unit)
    evaluate = run_once(lambda state, x: nnx.merge(graphdef, state)(x))
    arrays["eval_out"] = channels_first(evaluate(state, x))
    unit.train()
    graphdef, params, rest = nnx.split(unit, nnx.Param, ...)

    def forward(params, x):
        module = nnx.merge(graphdef, params, rest, copy=True)
        y = module(x)
        return y, nnx.state(module)

    @run_once
    def backward(params, x, upstream):
        y, gradient, after = jax.vjp(forward, params, x, has_aux=True)
        return y, after, *gradient(upstream)

    y, after, d_params, d_x = backward(params, x, upstream)
    arrays |= {"train_out": channels_first(y), "input_grad": channels_first(d_x)}
    nnx.update(unit, after)
    for name, (variable, kind) in variables.items():
        if kind in ("mean", "var"):
            arrays[f"buffer_after/{name}"] = np.asarray(variable[...])
    nnx.update(unit, d_params)
    for name, (variable, kind) in variables.items():
        if kind not in ("mean", "var"):
            value = np.asarray(variable[...])
            moved = np.transpose(value, (3, 2, 0, 1)) if kind == "weight" else value
            arrays[f"grad/{name}"] = moved
    facts = {
        "model": MODEL,
        "description": f"ImageNet residual unit, {origin}",
        "input_shape": shapes["input"],
        "output_shape": shapes["output"],
        "param_shapes": {
            name.removeprefix("grad/"): value.shape
            for name, value in arrays.items()
            if name.startswith("grad/")
        },
        "convs": convs,
        "bn_eps": MxBatchNorm.keywords["eps"],
        "bn_momentum_keep_old": KEEP,
        "permutations_branch_factor": {},
    }
    path = folder / f"{MODEL}.json"
    path.write_text(json.dumps(facts))
    np.savez(path.with_suffix(".npz"), **arrays)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("origin", NAMES)
@pytest.mark.parametrize(("in_channels", "stride"), [(8, 1), (4, 2)])
def test_an_imagenet_unit_by_itself_is_compared(tmp_path, origin, in_channels, stride):
    with jax.enable_x64(True):
        path = record(tmp_path, origin, in_channels, stride)
        facts = json.loads(path.read_text())
        golden_igcnets.reader(facts)(path).check()

        arrays = dict(np.load(path.with_suffix(".npz")))
        arrays["train_out"] *= 1.001
        np.savez(path.with_suffix(".npz"), **arrays)
        with pytest.raises(AssertionError, match="train_out"):
            golden_igcnets.reader(facts)(path).check()


def test_a_dilated_expander_is_compared(tmp_path):
    """The recording masks the dense kernel of XLA's own dilated convolution."""
    path = tmp_path / "layer_conv3x3_s1p2d2.json"
    model, weight_name, degree = path.stem, "fpWeight", 2
    facts = dict(model=model, layer="ExpanderConv2d", weight_name=weight_name)
    facts |= dict(rule="head", side="output", I=6, O=4, K=3, k=degree, s=1, p=2, d=2)
    rng = generator(f"{model}/{weight_name}/connections")
    edges = connectivity.draw_expander(6, 4, degree, "per_output", rng)
    mask = connectivity.to_matrix(edges, 6, 4).T
    arrays = {"mask": mask.astype(np.uint8)}
    arrays["x"] = normal(f"{model}/input", (2, 6, 7, 7))
    arrays["weight"] = draw(f"{model}/{weight_name}", (4, 6, 3, 3), "weight")
    arrays["gradout"] = normal(f"{model}/gradout", (2, 4, 7, 7))

    def forward(x, weight):
        return jax.lax.conv_general_dilated(
            *(x, weight * mask[..., None, None], (1, 1), [(2, 2)] * 2),
            rhs_dilation=(2, 2),
        )

    with jax.enable_x64(True):
        arrays["y"], gradient = jax.vjp(forward, arrays["x"], arrays["weight"])
        arrays["grad_x"], arrays["grad_weight"] = gradient(arrays["gradout"])
        path.write_text(json.dumps(facts | {"nnz": int(mask.sum())}))
        np.savez(path.with_suffix(".npz"), **arrays)
        golden_layers.reader(path)(path).check()

        path.write_text(json.dumps(facts | {"nnz": int(mask.sum()), "d": 1, "p": 1}))
        with pytest.raises(AssertionError, match="output : relative error"):
            golden_layers.reader(path)(path).check()


def test_a_float32_mean_near_zero_has_the_spacing_of_the_averaged_values():
    x = 50 * generator("x").standard_normal((1000, 1)).astype(np.float32)
    x -= x.mean()
    # Sums one after the other, as the originals do on a CPU.
    in_float32 = np.float32(0.1) * (x.cumsum(0, np.float32)[-1] / np.float32(1000))
    with jax.enable_x64(True):
        norm = BatchNorm(1)
        sources = by_layer(norm, lambda path, layer: TORCH_LEAVES[path[-1]])
        trained = train(norm, sources, x.astype(np.float64), lambda y: y.sum())
    mean, spacing = trained["statistics"]["running_mean"], trained["spacing"]
    assert spacing == {"running_mean": np.spacing(np.float32(50))}
    spacing = spacing["running_mean"]

    def compare(expected, **options):
        comparison = Comparison()
        comparison.add("statistics", mean, expected, **options)
        comparison.check()

    compare(in_float32, spacing=spacing)
    with pytest.raises(AssertionError, match=f"allowed {ROUNDED:.0e}"):
        compare(in_float32)
    wrong = mean + np.array([-2, 2]).reshape(2, 1) * spacing
    for value in wrong.astype(np.float32):
        with pytest.raises(AssertionError, match="statistics"):
            compare(value, spacing=spacing)
    # A float64 recording has no such errors.
    with pytest.raises(AssertionError, match="allowed 1e-09"):
        compare(in_float32.astype(np.float64) * (1 + 1e-12), spacing=spacing)

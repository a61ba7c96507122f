"""Layer files that the golden reader supports and no committed file shows."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from nets.layers.wiring import Wiring
from nets.plain import MxBatchNorm, Unit
from tests.support import golden_igcnets
from tests.support.golden_files import channels_first, channels_last, draw, normal

MODEL, KEEP = "layer_resunit_img_test", 0.9
# The names of the blocks and of the convolutions in a block, by the file's origin.
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
    arrays["eval_out"] = channels_first(np.asarray(unit(x)))
    unit.train()
    graphdef, params, rest = nnx.split(unit, nnx.Param, ...)

    def forward(params, x):
        module = nnx.merge(graphdef, params, rest, copy=True)
        y = module(x)
        return y, nnx.state(module)

    y, gradient, after = jax.vjp(forward, params, x, has_aux=True)
    d_params, d_x = gradient(upstream)
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

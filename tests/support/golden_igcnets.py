"""Layer files of IGCNets: blocks and units, permutations, training trajectories."""

import json
import pathlib

import numpy as np
from flax import nnx

import convert
import optimizers
from convert import igcnets
from convert.sources import assign, by_layer, empty, tensor_shapes, to_reference
from nets.layers.interleaved import InterleavedConv, permute
from nets.layers.wiring import Wiring
from nets.plain import ConvBlock, MxBatchNorm, Unit
from tests.support.golden_checks import (
    ROUNDED,
    Comparison,
    by_path,
    cross_entropy,
    evaluate,
    forward_backward,
    train,
)
from tests.support.golden_checks import trajectory as train_on
from tests.support.golden_files import (
    channels_first,
    channels_last,
    draw,
    normal,
    read_layers,
)

KINDS = {"beta": "bias", "bias": "bias", "gamma": "gamma", "weight": "weight"}
KINDS |= {"moving_mean": "mean", "moving_var": "var"}


def reader(facts: dict):
    if "permutations_branch_factor" in facts:
        return layer
    if "decay_scope" in facts:
        return trajectory
    if facts and all(has_indices(entry) for entry in facts.values()):
        return permutations
    return None


def has_indices(entry) -> bool:
    return isinstance(entry, dict) and "source_index" in entry


def permutations(path: pathlib.Path) -> Comparison:
    comparison = Comparison()
    for name, facts in json.loads(path.read_text()).items():
        found = np.arange(facts["channels"])
        for branches in [
            facts[key]
            for key in ("branch_factor", "first_branch", "second_branch")
            if key in facts
        ]:
            found = permute(found, branches)
        comparison.add("indices", found, facts["source_index"], 0.0, name)
        if "inverse_source_index" in facts:
            inverse = np.argsort(found)
            comparison.add("indices", inverse, facts["inverse_source_index"], 0.0, name)
        if "is_identity" in facts:
            assert (found == np.arange(found.size)).all() == facts["is_identity"]
    return comparison


def layer(path: pathlib.Path) -> Comparison:
    """A block or a unit with a recorded output gradient, every value."""
    comparison, (facts, arrays) = Comparison(), read_layers(path)
    model = facts["model"]
    net = empty(lambda: _build(facts))
    recorded = {name: tuple(shape) for name, shape in facts["param_shapes"].items()}
    sources = _sources(net, recorded)
    shapes = tensor_shapes(sources)
    assert recorded.items() <= shapes.items()
    assign(net, sources, {k: _draw(model, k, shape) for k, shape in shapes.items()})

    x = channels_last(normal(f"{model}/input", facts["input_shape"]))
    upstream = channels_last(normal(f"{model}/head_grad", facts["output_shape"]))
    net.eval()
    found = {"eval_out": evaluate(net, x)}
    net.train()
    trained = train(net, sources, x, lambda y: (y * upstream).sum())
    found |= {"train_out": trained["output"], "input_grad": trained["input gradient"]}
    found = {name: channels_first(y) for name, y in found.items()}
    found |= {f"grad/{k}": v for k, v in trained["gradients"].items()}
    found |= {f"buffer_after/{k}": v for k, v in trained["statistics"].items()}
    assert found.keys() == arrays.keys()
    largest = max(np.abs(v).max() for k, v in arrays.items() if k.startswith("grad/"))
    for name, expected in arrays.items():
        allowed = None
        if name.startswith("grad/") and expected[0].shape == (1, 1, 1):
            # With L = 1 this weight only scales a channel, which BN undoes. Its
            # gradient is zero up to eps; the recorded one is float32 rounding.
            allowed = ROUNDED * largest / np.abs(expected).max()
        spacing = trained["spacing"].get(name.removeprefix("buffer_after/"))
        group = name.split("/")[0]
        comparison.add(group, found[name], expected, allowed, name, spacing=spacing)
    return comparison


def _build(facts: dict) -> nnx.Module:
    """Builds the layer with the groups in the list of its convolutions."""
    channels = (facts["input_shape"][1], facts["output_shape"][1])
    assert facts["bn_eps"] == MxBatchNorm.keywords["eps"]
    convs = {conv["name"]: conv for conv in facts["convs"]}
    names = [n for n in convs if n.endswith("conv1")]
    stride = int(convs[names[0]]["stride"][1])
    norm = lambda size: MxBatchNorm(size, keep=facts["bn_momentum_keep_old"])
    if convs[names[0][:-1] + "2"]["kernel"] != "(1, 1)":  # no pair: a regular unit
        return Unit(*channels, stride, norm=norm, wiring=Wiring(), rngs=nnx.Rngs(0))
    groups = [
        (convs[name]["groups"], convs[name[:-1] + "2"]["groups"]) for name in names
    ]
    if len(names) == 1:
        (primary, secondary), *_ = groups
        pair = InterleavedConv(
            *(*channels, 3),
            **dict(primary_groups=primary, secondary_groups=secondary),
            **dict(stride=stride, padding=1, rngs=nnx.Rngs(0)),
        )
        relu = "no ReLU" not in facts["description"]
        return ConvBlock(pair, norm(channels[1]), relu=relu)
    primary, secondary = groups[0]
    options = dict(wiring=Wiring("interleaved", primary_groups=primary), norm=norm)
    old = secondary != channels[1] // primary
    return Unit(*channels, stride, old_transition=old, **options, rngs=nnx.Rngs(0))


def _sources(net: nnx.Module, recorded: dict):
    """Returns the sources under the names of the builder that wrote the file.

    The files call their only block `blk`.
    """

    def named(naming):
        def name(path, layer):
            full = igcnets.name(("stages", 0, 0, *path), layer, naming)
            return full.replace("g1_b1", "blk")

        return by_layer(net, name)

    namings = (igcnets.RESNET, igcnets.SYMBOLS, igcnets.BUILDER, igcnets.REGULAR)
    candidates = map(named, namings)
    return next(x for x in candidates if recorded.keys() <= tensor_shapes(x).keys())


def trajectory(path: pathlib.Path) -> Comparison:
    """Trains on a new batch in each step, from running statistics of zero."""
    comparison, (facts, arrays) = Comparison(), read_layers(path)
    model = facts["tag"]
    fields = {"L": "L", "M": "M", "depth": "depth", "classes": "num_classes"}
    config = {ours: facts[theirs] for theirs, ours in fields.items()}
    reference = dict(system="igcnets", net=facts["network"], config=config)
    net = convert.build(reference)
    sources = convert.find("igcnets", facts["network"]).sources(net)
    shapes = tensor_shapes(sources)
    tensors = {name: _draw(model, name, shape) for name, shape in shapes.items()}
    tensors |= {k: np.zeros_like(v) for k, v in tensors.items() if "_moving_" in k}
    convert.load(net, tensors)
    shape = (facts["steps"], facts["batch"], 3, 32, 32)
    images = np.moveaxis(normal(f"{model}/input", shape), 2, -1)

    recipe = {k: facts[k] for k in ("momentum", "weight_decay")}
    optimizer = optimizers.sgd(facts["lr"], nesterov=True, **recipe)
    loss = cross_entropy(np.arange(facts["batch"]))
    run, variables = forward_backward(net, loss)
    losses, _, variables = train_on(run, variables, images, optimizer)
    comparison.add("losses", losses, arrays["losses"])
    after = to_reference(
        sources, by_path(variables["params"]) | by_path(variables["stats"])
    )
    # The original's running statistics are float32; the error carries over.
    for kind, allowed in (("param", None), ("buffer", ROUNDED)):
        names, norms = arrays[f"{kind}_names"], arrays[f"final_{kind}_norms"]
        for name, expected in zip(names, norms, strict=True):
            found = np.linalg.norm(after[str(name)])
            comparison.add(f"{kind} norms", found, expected, allowed, name=name)
    nnx.update(net, nnx.State(variables["params"]), nnx.State(variables["stats"]))
    expected = arrays["eval_logits_on_first_batch_after"]
    comparison.add("eval", evaluate(net, images[0]), expected, ROUNDED)
    return comparison


def _draw(model: str, name: str, shape) -> np.ndarray:
    (kind,) = {kind for leaf, kind in KINDS.items() if name.endswith(f"_{leaf}")}
    return draw(f"{model}/{name}", shape, kind)

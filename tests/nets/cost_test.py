"""Counts from shapes, against arithmetic by hand and counts of the originals."""

import functools
import json
import re

import jax
import pytest
from flax import nnx

import nets
from convert.sources import empty
from nets import cost
from nets.layers.conv import Conv, Linear
from nets.layers.expander import ExpanderConv
from nets.layers.norm import BatchNorm
from tests.conftest import SHARED
from tests.support.counting import with_classes

COUNTS = SHARED / "golden/xnets/counts.json"


class Small(nnx.Module):
    """The attributes are not in the order of execution, and `mix` is called twice."""

    def __init__(self, rngs):
        self.head = Linear(6, 10, rngs=rngs)
        options = dict(degree=2, sampling="per_output", padding=1, rngs=rngs)
        self.mix = ExpanderConv(6, 6, 3, **options)
        self.norm = BatchNorm(6)
        self.stem = Conv(4, 6, 3, stride=2, padding=1, groups=2, rngs=rngs)
        self.unused = Linear(5, 7, bias=False, rngs=rngs)

    def __call__(self, x):
        x = self.norm(self.stem(x))
        return self.head(self.mix(self.mix(x)).mean((1, 2)))


def test_layers_of_a_small_net():
    net = empty(lambda: Small(nnx.Rngs(0)))
    layers = cost.layers(net, (5, 8, 8, 4))
    pixels, stem, mix, dense_mix = 4 * 4, 9 * 2 * 6, 9 * 6 * 2, 9 * 6 * 6
    assert [(x.path, x.kind, x.output_shape) for x in layers] == [
        ("stem", "Conv", (5, 4, 4, 6)),
        ("norm", "BatchNorm", (5, 4, 4, 6)),
        ("mix", "ExpanderConv", (5, 4, 4, 6)),
        ("head", "Linear", (5, 10)),
        ("unused", "Linear", ()),
    ]
    assert [(x.parameters, x.dense_parameters) for x in layers] == [
        (stem, stem),
        (12, 12),
        (mix, dense_mix),
        (70, 70),
        (35, 35),
    ]
    assert [(x.macs, x.dense_macs) for x in layers] == [
        (stem * pixels, stem * pixels),
        (0, 0),
        (2 * mix * pixels, 2 * dense_mix * pixels),
        (60, 60),
        (0, 0),
    ]
    assert cost.total(layers) == cost.Cost(
        parameters=stem + 12 + mix + 70 + 35,
        dense_parameters=stem + 12 + dense_mix + 70 + 35,
        macs=(stem + 2 * mix) * pixels + 60,
        dense_macs=(stem + 2 * dense_mix) * pixels + 60,
    )


def test_counts_of_an_abstract_net_compile_nothing():
    config = dict(name="densenet", depth=10, growth=4, wiring=dict(kind="expander"))
    compilations = []

    def listen(event, *_, **__):
        if "compile" in event and "backend" in event:
            compilations.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.jit(lambda x: x + 1)(1)
        assert compilations.pop()  # the listener works
        compilations.clear()
        layers = cost.of(config, (32, 32, 3))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not compilations
    concrete = cost.layers(nets.create(config, nnx.Rngs(0)), (1, 32, 32, 3))
    assert layers == concrete


def _classless(entry) -> str:
    """Sort key that puts nets which differ only in their classes side by side.

    They usually run in the same process, which then counts only one of them.
    """
    return "{}-{rule}-{transition}".format(
        re.sub(r"-c\d+$", "", entry["name"]), **entry
    )


def _recorded():
    """Returns the nets counted in the original code, as test parameters."""
    if not COUNTS.exists():
        reason = pytest.mark.skip(f"reference material {COUNTS} is not here")
        return [pytest.param({}, id="counts", marks=reason)]
    return [
        pytest.param(
            entry,
            id="-".join(
                filter(None, (entry["name"], entry["rule"], entry["transition"]))
            ),
        )
        for entry in sorted(json.loads(COUNTS.read_text())["models"], key=_classless)
    ]


NAMES = (
    (r"densenet\w*?_cifar-(?P<depth>\d+)-(?P<growth>\d+)-?(\d+)?-c\d+", "densenet"),
    (r"densenet\D*(?P<depth>\d+)(-\d+)?", "densenet_imagenet"),
    (r"resnet\D*(?P<depth>\d+)(-\d+)?", "resnet"),
    (r"vgg(?P<depth>\d+)\D*", "vgg"),
    (r"mobilenet-(?P<width>[\d.]+)\S*", "mobilenet"),
    (r"alexnet\D*", "alexnet"),
)


def _config(recorded):
    """Returns the `net` section of an entry, from its name and rule."""
    full, transition = recorded["name"], recorded["transition"]
    (match, name) = next(
        (match, name)
        for pattern, name in NAMES
        if (match := re.fullmatch(pattern, full))
    )
    config = {
        k: float(v) if k == "width" else int(v) for k, v in match.groupdict().items()
    }
    config |= dict(name=name, num_classes=1000)
    if classes := re.search(r"-c(\d+)$", full):
        config["num_classes"] = int(classes[1])
    if name == "resnet":
        config |= dict(form="imagenet", shortcut="B")
    if name == "vgg":
        config |= dict(batch_norm="_bn" in full, num_classes=10)
    factor = re.search(r"-(\d+)(-c\d+)?$", full)
    if "expander" in full:
        sampling = {"head": "smaller_side", "output": "per_output"}[recorded["rule"]]
        config["wiring"] = dict(kind="expander", sampling=sampling)
        config["wiring"] |= dict(compress=int(factor[1])) if factor else {}
        config |= dict(wired_transitions=transition == "expander") if transition else {}
    elif "grouped" in full:
        config["wiring"] = dict(kind="grouped", groups=2)
    elif "groups" in full:
        config["wiring"] = dict(kind="grouped", groups=int(factor[1]))
    return config


def _layers(config, size) -> list[cost.LayerCost]:
    """Derives counts for CIFAR-100 from those for CIFAR-10."""
    if config["num_classes"] != 100:
        return _count(json.dumps(config), size)
    return with_classes(_count(json.dumps(config | {"num_classes": 10}), size), 100)


@functools.cache
def _count(config: str, size: int) -> list[cost.LayerCost]:
    return cost.of(json.loads(config), (size, size, 3))


@pytest.mark.parametrize("wiring", ["dense", "grouped", "expander"])
def test_the_number_of_classes_changes_nothing_but_the_classifier(wiring):
    config = dict(name="densenet", depth=10, growth=8, wiring=dict(kind=wiring))
    config["num_classes"] = 100
    assert _layers(config, 32) == cost.of(config, (32, 32, 3))


@pytest.mark.slow
@pytest.mark.parametrize("recorded", _recorded())
def test_counts_of_the_original(recorded):
    size = recorded["input"]
    config = _config(recorded)
    total = cost.total(_layers(config, size))
    assert total.parameters == recorded["params_effective"]
    assert total.macs == recorded["macs_nonzero"]
    if config.get("wiring", {}).get("kind") != "grouped":
        # The original's masked kernels are its dense twin's; grouped ones are not.
        assert total.dense_parameters == recorded["params_trainable"]
        assert total.dense_macs == recorded["macs_dense_equivalent"]


@pytest.mark.parametrize(
    "net",
    [
        dict(name="densenet", depth=10, growth=8),
        dict(name="igc_resnet", depth=8, width=8),  # shortcuts follow the wiring, too
        dict(name="mobilenet", width=0.25),  # the twin has depthwise convolutions, too
        dict(name="gunn"),  # stacked kernels
    ],
    ids=lambda net: net["name"],
)
@pytest.mark.parametrize("kind", ["grouped", "interleaved"])
def test_the_dense_counts_are_those_of_the_dense_twin(net, kind):
    wired, dense = (
        cost.total(cost.of(net | {"wiring": {"kind": wiring}}, (32, 32, 3)))
        for wiring in (kind, "dense")
    )
    assert wired.parameters < dense.parameters
    assert wired.dense_parameters == dense.parameters == dense.dense_parameters
    assert wired.dense_macs == dense.macs == dense.dense_macs

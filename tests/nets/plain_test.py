"""IGCNets: counts of the originals' builders, depths, transitions, partitions."""

import numpy as np
import pytest
from flax import nnx

import nets
from nets import cost
from nets.layers.interleaved import InterleavedConv
from nets.layers.wiring import Wiring
from nets.plain import IgcResNet, Plain, units_per_stage

# depth, L, M: parameters for 10 classes, millions of multiply-adds. L = 0: a
# regular net of M channels. Specification, section 2; measured in the originals.
COUNTS = {
    "plain": [
        (8, 0, 16, 75_290, 12.24),
        (20, 0, 18, 341_020, 51.26),
        (62, 0, 16, 950_234, 139.64),
        (8, 4, 8, 78_634, 13.14),
        (8, 24, 2, 48_442, 9.88),
        (20, 4, 8, 277_546, 42.37),
        (20, 24, 2, 155_962, 28.76),
        (38, 4, 8, 575_914, 86.21),
        (38, 24, 2, 317_242, 57.07),
        (62, 24, 2, 532_282, 94.82),
        (20, 16, 32, 17_527_306, 2669.17),
        (20, 450, 2, 19_026_910, 4661.49),
        (20, 32, 26, 23_829_322, 3698.43),
    ],
    "igc_resnet": [
        (20, 0, 16, 272_474, 40.81),
        (20, 0, 18, 344_476, 51.59),
        (50, 0, 16, 758_554, 111.59),
        (98, 0, 18, 1_943_164, 284.50),
        (20, 4, 8, 281_258, 42.73),
        (20, 24, 2, 164_410, 29.74),
        (50, 24, 2, 433_210, 76.92),
        (74, 4, 8, 1_176_362, 174.26),
        (98, 24, 2, 863_290, 152.42),
        (20, 16, 32, 17_746_442, 2692.24),
        (20, 450, 2, 21_485_710, 4974.37),
        (20, 32, 26, 24_215_370, 3741.02),
    ],
}


def interleaved(primary, secondary=0):
    return dict(kind="interleaved", primary_groups=primary, secondary_groups=secondary)


# Section 3. The last: the README's command as written, M left at its default of 4.
IMAGENET = [
    (dict(width=64), 11_689_512, 1.8141),
    (dict(width=69), 13_542_457, 2.0986),
    (dict(width=128, wiring=interleaved(4)), 12_251_240, 1.9446),
    (dict(width=256, wiring=interleaved(16)), 13_528_296, 2.2660),
    (
        dict(width=100, expand_first_stage=True, wiring=interleaved(0, 2)),
        *(8_637_900, 1.2648),
    ),
    (
        dict(width=400, expand_first_stage=True, wiring=interleaved(0, 8)),
        *(36_852_600, 5.9623),
    ),
]


def abstract(name, **fields):
    return nnx.eval_shape(lambda: nets.create(dict(name=name) | fields, nnx.Rngs(0)))


def count(net, size):
    return cost.total(cost.layers(net, (1, size, size, 3)))


def _rows():
    for name, rows in COUNTS.items():
        for depth, primary, size, *counts in rows:
            fields = dict(depth=depth, width=primary * size or size)
            if primary:
                fields |= dict(wiring=interleaved(primary))
            label = f"{name}-{depth}-L{primary}M{size}"
            yield pytest.param(name, fields, *counts, id=label)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "fields", "parameters", "millions"), _rows())
def test_counts_of_the_originals(name, fields, parameters, millions):
    total = count(abstract(name, **fields), 32)
    assert total.parameters == parameters
    assert round(total.macs / 1e6, 2) == millions


@pytest.mark.slow
@pytest.mark.parametrize(("fields", "parameters", "billions"), IMAGENET)
def test_counts_for_imagenet(fields, parameters, billions):
    total = count(abstract("igc_resnet_imagenet", **fields), 224)
    assert total.parameters == parameters
    assert round(total.macs / 1e9, 4) == billions


@pytest.mark.parametrize(
    ("depth", "units"),
    [
        (8, [1, 1, 1]),
        (20, [3, 3, 3]),
        (21, [3, 3, 3]),
        (22, [3, 3, 4]),
        (24, [3, 4, 4]),
    ],
)
def test_units_are_spread_over_the_stages(depth, units):
    assert units_per_stage(depth) == units
    net = abstract("igc_resnet", depth=depth, width=4)
    assert [len(stage) for stage in net.stages] == units


def groups(net):
    """Returns (primary, secondary) of every pair, in order."""
    modules = [m for _, m in nnx.iter_modules(net) if isinstance(m, InterleavedConv)]
    return [m.secondary.groups for m in modules]


def test_plain_nets_double_m_and_not_l():
    net = abstract("plain", depth=8, width=32, wiring=interleaved(4))
    assert groups(net) == [(4, 8)] * 2 + [(4, 16)] * 2 + [(4, 32)] * 2


def test_the_old_transition_only_doubles_secondary_weights():
    fields = dict(depth=8, width=32, wiring=interleaved(4))
    old, new = (
        abstract("igc_resnet", transition_secondary=which, **fields)
        for which in ("old", "new")
    )
    assert groups(old) == [(4, 8), (4, 8), (4, 8), (4, 16), (4, 16), (4, 32)]
    assert groups(new) == [(4, 8), (4, 8), (4, 16), (4, 16), (4, 32), (4, 32)]
    assert groups(abstract("igc_resnet", **fields)) == groups(old)  # the originals'
    shapes = (dict(nnx.to_flat_state(nnx.state(net, nnx.Param))) for net in (old, new))
    old, new = ({k: v.shape for k, v in s.items()} for s in shapes)
    changed = {path: (old[path], new[path]) for path in old if old[path] != new[path]}
    secondary = lambda stage: ("stages", stage, 0, "block1", "conv", "secondary")
    assert changed == {
        (*secondary(1), "kernel"): ((1, 1, 8, 64), (1, 1, 4, 64)),
        (*secondary(2), "kernel"): ((1, 1, 8, 128), (1, 1, 4, 128)),
    }


def test_the_projection_is_grouped_like_the_primary_convolutions():
    for fields, expected in (
        (dict(width=16, wiring=interleaved(4)), [None, 4, 4, 4]),
        (
            dict(width=10, wiring=interleaved(0, 2), expand_first_stage=True),
            [10, 20, 40, 80],
        ),
    ):
        net = abstract("igc_resnet_imagenet", depth=10, **fields)
        shortcuts = [stage[0].shortcut for stage in net.stages]
        assert [s and s.conv.groups for s in shortcuts] == expected
        assert [stage[0].block1.conv.primary.stride for stage in net.stages] == [
            *(1, 2, 2, 2)
        ]


@pytest.mark.parametrize(("net", "keep"), [(Plain, 0.99), (IgcResNet, 0.9)])
def test_normalisation_is_mxnets(net, keep):
    built = nnx.eval_shape(lambda: net(depth=8, width=4, rngs=nnx.Rngs(0)))
    norm = built.stem.norm
    assert (norm.eps, norm.keep, norm.running_var) == (2e-5, keep, "biased")


def test_initial_running_variances():
    for initial in (0.0, 1.0):
        config = dict(name="plain", depth=5, width=4, initial_var=initial)
        stats = nnx.state(nets.create(config, nnx.Rngs(0)), nnx.BatchStat)
        norm = stats["stages"][0][0]["norm"]
        assert set(norm["var"].get_value().tolist()) == {initial}
        assert not norm["mean"].get_value().any()


def test_initial_weights_have_the_variance_of_the_group():
    """2 / fan-in within a group, which is 2 / L for secondary convolutions."""
    wiring = Wiring("interleaved", primary_groups=24)
    pair = wiring.conv(96, 192, 3, rngs=nnx.Rngs(0))
    for kernel, fan in ((pair.primary.kernel, 9 * 4), (pair.secondary.kernel, 24)):
        assert np.var(kernel[...]) == pytest.approx(2 / fan, rel=0.1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(name="plain", depth=21), r"depth 3 n \+ 2 with n > 0, got 21"),
        (dict(name="plain", depth=2), r"n > 0, got 2"),
        (dict(name="igc_resnet", depth=7), "depth is at least 8, got 7"),
        (dict(name="igc_resnet_imagenet", depth=20), r"8 n \+ 2 with n > 0, got 20"),
        (dict(name="igc_resnet", transition_secondary="odd"), "'odd': choose from old"),
        (
            dict(name="plain", width=18, wiring=interleaved(4)),
            "4 primary groups do not divide 18 input",
        ),
        (
            dict(name="plain", width=15, wiring=interleaved(0, 3)),
            "10 primary groups do not divide 15 input",
        ),
    ],
)
def test_impossible_nets_are_rejected(fields, message):
    with pytest.raises(ValueError, match=message):
        abstract(**fields)

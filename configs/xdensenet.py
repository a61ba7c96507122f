"""X-DenseNet for 32x32 images (Deep Expander Networks, arXiv 1711.08757).

python main.py --config=configs/xdensenet.py --workdir=/tmp/run
python main.py --config=configs/xdensenet.py:40-48-2,cifar100 --workdir=/tmp/run

A variant is depth-growth-compression; without the last number it is the dense twin,
with "groups" the grouped one.
"""

from configs import common
from configs.common import Variant

README = "Deep-Expander-Networks README: best epoch on the test set"
LOG = "Deep-Expander-Networks training log: best of its epochs, 201 to 300 of 300"


def _dense(growth, depth=40):
    return {"depth": depth, "growth": growth}


def _expander(growth, wired_transitions, depth=40, compress=2):
    """As the published logs print them, with output-side sampling (their history)."""
    wiring = {"kind": "expander", "compress": compress, "sampling": "per_output"}
    net = {"wiring": wiring, "wired_transitions": wired_transitions}
    return _dense(growth, depth) | net


def _grouped(growth):
    return _dense(growth) | {"wiring": {"kind": "grouped", "groups": 2}}


def _logged(depth, growth, wired_transitions, rows):
    """CIFAR-100 only; rows: compress: parameters, error."""
    return {
        f"{depth}-{growth}-{compress}": common.cifar_variant(
            _expander(growth, wired_transitions, depth, compress),
            (None, parameters),
            (None, error),
            LOG,
        )
        for compress, (parameters, error) in rows.items()
    }


# The README's operations are half of the dense twin's, not those of the net (144.7M for
# 40-24-2 with its transitions expanders, 157.9M as it was run).
VARIANTS = {
    "40-24-2": common.cifar_variant(
        _expander(24, False), (375_850, 399_700), (5.17, 25.63), README, "0.4M", "144M"
    ),
    "40-36-2": common.cifar_variant(
        _expander(36, False), (835_066, 870_796), (5.02, 23.31), README, "0.75M", "324M"
    ),
    "40-48-2": common.cifar_variant(
        _expander(48, True),
        (1_380_682, 1_428_292),
        (4.52, 22.3),
        README,
        "1.4M",
        "575M",
    ),
    "40-60-2": common.cifar_variant(
        _expander(60, True),
        (2_148_490, 2_207_980),
        (4.29, 21.47),
        README,
        "2.15M",
        "898M",
    ),
    "40-24": common.cifar_variant(_dense(24), (690_346, 714_196), (5.21, None), LOG),
    "40-36": common.cifar_variant(
        _dense(36), (1_542_682, 1_578_412), (4.74, 22.16), LOG
    ),
    "40-48": common.cifar_variant(
        _dense(48), (2_733_130, 2_780_740), (4.36, 20.97), LOG
    ),
    "40-60": common.cifar_variant(
        _dense(60), (4_261_690, 4_321_180), (4.09, 20.13), LOG
    ),
    "40-100": common.cifar_variant(
        _dense(100), (11_798_810, 11_897_900), (None, 19.1), LOG
    ),
    "40-200": common.cifar_variant(
        _dense(200), (47_077_610, 47_275_700), (None, 18.38), LOG
    ),
    "58-60": common.cifar_variant(
        _dense(60, 58), (7_622_110, 7_709_950), (None, 19.21), LOG
    ),
    "70-60": common.cifar_variant(
        _dense(60, 70), (10_320_190, 10_426_930), (None, 18.72), LOG
    ),
    "100-12": common.cifar_variant(
        _dense(12, 100), (769_162, 800_032), (None, 22.67), LOG
    ),
    "100-24": common.cifar_variant(
        _dense(24, 100), (3_020_506, 3_082_156), (None, 19.98), LOG
    ),
    **_logged(
        40,
        100,
        True,
        {4: (3_092_900, 21.13), 8: (1_623_600, 22.25), 16: (888_700, 23.8)},
    ),
    **_logged(
        40,
        200,
        True,
        {
            4: (12_055_700, 19.34),
            10: (5_011_700, 20.54),
            20: (2_663_700, 21.67),
            30: (1_853_700, 22.71),
            50: (1_254_900, 24.3),
            80: (899_100, 26.74),
        },
    ),
    **_logged(
        58,
        60,
        False,
        {
            2: (4_225_870, 19.71),
            4: (2_482_750, 21.26),
            8: (1_611_910, 22.02),
            16: (1_176_250, 24.13),
        },
    ),
    **_logged(
        70,
        60,
        True,
        {2: (5_305_285, 19.11), 4: (2_744_200, 20.44), 8: (1_463_005, 22.52)},
    ),
    **_logged(70, 60, False, {16: (1_624_870, 22.77)}),
    "40-24-groups-2": common.cifar_variant(_grouped(24), (352_234, 376_084)),
    "40-36-groups-2": common.cifar_variant(_grouped(36), (781_930, 817_660)),
    "40-48-groups-2": common.cifar_variant(_grouped(48), (1_380_682, 1_428_292)),
    "40-60-groups-2": common.cifar_variant(_grouped(60), (2_148_490, 2_207_980)),
    # Ours: what `make run` trains, a few minutes on two cores.
    "22-8-2": Variant(
        {
            "depth": 22,
            "growth": 8,
            "wiring": {"kind": "expander", "sampling": "per_output"},
        },
        {"digits": 17_418},
    ),
}


def get_config(argument: str = ""):
    config = common.select(
        argument,
        VARIANTS,
        "40-24-2",
        name="densenet",
        depth=40,
        growth=24,
        reduction=0.5,  # share of the maps that a transition keeps
        bottleneck=True,
        dropout=0.0,
        wired_transitions=True,  # or dense ones
    )
    data = config.data.name
    config.train.update(batch_size=64, epochs=300.0, last_batch="partial")
    config.optimizer.update(drop_epochs=(150.0, 225.0), min_learning_rate=0.0005)
    if data == "digits":
        _digits(config)
    return common.apply_recipe(config)


def _digits(config):
    """1,437 images of digits: few and easy."""
    config.data.pad = 2
    config.train.update(batch_size=32, epochs=20.0, log_every_steps=20)
    config.train.last_batch = "fill"  # one shape of batches, one program
    config.optimizer.update(drop_epochs=(13.0, 18.0))
    config.eval.every_epochs = 5.0

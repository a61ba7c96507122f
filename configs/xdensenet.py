"""X-DenseNet for 32x32 images (Deep Expander Networks, arXiv 1711.08757).

python main.py --config=configs/xdensenet.py --workdir=/tmp/run
python main.py --config=configs/xdensenet.py:40-48-2,cifar100 --workdir=/tmp/run

A variant is depth-growth-compression. Without the compression it is the dense twin;
with "groups" before the compression it is the grouped twin.
"""

from configs import common
from configs.common import Variant, cifar_variant

README = "Deep-Expander-Networks README: best epoch on the test set"
LOG = "Deep-Expander-Networks training log: best of its epochs, 201 to 300 of 300"
# Growth: wired_transitions, parameters with 10 and with 100 classes, errors on CIFAR-10
# and CIFAR-100, parameters and operations as printed. The README prints half of the
# dense twin's operations instead of the net's own: 40-24-2 has 157.9M as trained and
# 144.7M with expander transitions.
PUBLISHED = {
    24: (False, (375_850, 399_700), (5.17, 25.63), "0.4M", "144M"),
    36: (False, (835_066, 870_796), (5.02, 23.31), "0.75M", "324M"),
    48: (True, (1_380_682, 1_428_292), (4.52, 22.3), "1.4M", "575M"),
    60: (True, (2_148_490, 2_207_980), (4.29, 21.47), "2.15M", "898M"),
}
NOTES = {
    36: "no reading of the code has 0.75M parameters: 835,066 with dense transitions, "
    "as in the log, 781,930 with expander ones"
}
# Parameters with 10 and with 100 classes, errors on CIFAR-10 and CIFAR-100.
DENSE = {
    "40-24": ((690_346, 714_196), (5.21, None)),
    "40-36": ((1_542_682, 1_578_412), (4.74, 22.16)),
    "40-48": ((2_733_130, 2_780_740), (4.36, 20.97)),
    "40-60": ((4_261_690, 4_321_180), (4.09, 20.13)),
    "40-100": ((11_798_810, 11_897_900), (None, 19.1)),
    "40-200": ((47_077_610, 47_275_700), (None, 18.38)),
    "58-60": ((7_622_110, 7_709_950), (None, 19.21)),
    "70-60": ((10_320_190, 10_426_930), (None, 18.72)),
    "100-12": ((769_162, 800_032), (None, 22.67)),
    "100-24": ((3_020_506, 3_082_156), (None, 19.98)),
}
# Growth: parameters with 10 and with 100 classes, depth 40.
GROUPED = {
    24: (352_234, 376_084),
    36: (781_930, 817_660),
    48: (1_380_682, 1_428_292),
    60: (2_148_490, 2_207_980),
}
# Logs on CIFAR-100. (depth, growth, wired_transitions): compression: parameters, error.
LOGGED = {
    (40, 100, True): {
        4: (3_092_900, 21.13),
        8: (1_623_600, 22.25),
        16: (888_700, 23.8),
    },
    (40, 200, True): {
        4: (12_055_700, 19.34),
        10: (5_011_700, 20.54),
        20: (2_663_700, 21.67),
        30: (1_853_700, 22.71),
        50: (1_254_900, 24.3),
        80: (899_100, 26.74),
    },
    (58, 60, False): {
        2: (4_225_870, 19.71),
        4: (2_482_750, 21.26),
        8: (1_611_910, 22.02),
        16: (1_176_250, 24.13),
    },
    (70, 60, True): {
        2: (5_305_285, 19.11),
        4: (2_744_200, 20.44),
        8: (1_463_005, 22.52),
    },
    (70, 60, False): {16: (1_624_870, 22.77)},
}


def _expander(growth, wired_transitions, depth=40, compress=2):
    """Transitions and output-side sampling as in the logs."""
    wiring = {"kind": "expander", "compress": compress, "sampling": "per_output"}
    net = {"depth": depth, "growth": growth, "wiring": wiring}
    return net | {"wired_transitions": wired_transitions}


def _published(growth):
    wired, parameters, errors, printed, macs = PUBLISHED[growth]
    net, note = _expander(growth, wired), NOTES.get(growth, "")
    return cifar_variant(net, parameters, errors, README, printed, macs, note)


def _dense(name):
    depth, growth = map(int, name.split("-"))
    return cifar_variant({"depth": depth, "growth": growth}, *DENSE[name], LOG)


def _grouped(growth):
    wiring = {"kind": "grouped", "groups": 2}
    net = {"depth": 40, "growth": growth, "wiring": wiring}
    return cifar_variant(net, GROUPED[growth])


def _logged(depth, growth, wired_transitions, compress, parameters, error):
    net = _expander(growth, wired_transitions, depth, compress)
    return cifar_variant(net, (None, parameters), (None, error), LOG)


VARIANTS = {
    **{f"40-{growth}-2": _published(growth) for growth in PUBLISHED},
    **{name: _dense(name) for name in DENSE},
    **{
        f"{depth}-{growth}-{compress}": _logged(depth, growth, wired, compress, *row)
        for (depth, growth, wired), rows in LOGGED.items()
        for compress, row in rows.items()
    },
    **{f"40-{growth}-groups-2": _grouped(growth) for growth in GROUPED},
    # Ours: what `make run` trains in a few minutes on two cores.
    "22-8-2": Variant(_expander(8, True, depth=22), {"digits": 17_418}),
}


def get_config(argument: str = ""):
    config = common.select(
        argument,
        VARIANTS,
        "40-24-2",
        name="densenet",
        depth=40,
        growth=24,
        reduction=0.5,  # output over input channels of a transition
        bottleneck=True,
        dropout=0.0,
        wired_transitions=True,  # False: dense transitions
    )
    config.train.update(batch_size=64, epochs=300.0, last_batch="partial")
    config.optimizer.update(drop_epochs=(150.0, 225.0), min_learning_rate=0.0005)
    if config.data.name == "digits":  # a shorter recipe for 1,437 easy images
        config.data.pad = 2
        config.train.update(batch_size=32, epochs=20.0, log_every_steps=20)
        config.train.last_batch = "fill"  # one batch shape, so one compilation
        config.optimizer.update(drop_epochs=(13.0, 18.0))
        config.eval.every_epochs = 5.0
    return common.apply_recipe(config)

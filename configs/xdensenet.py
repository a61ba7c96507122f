"""X-DenseNet for 32x32 images (Deep Expander Networks, arXiv 1711.08757).

python main.py --config=configs/xdensenet.py --workdir=/tmp/run
python main.py --config=configs/xdensenet.py:40-48-2,cifar100 --workdir=/tmp/run

A variant is depth-growth-compression; without the last number it is the dense twin.
Deviation: the last, partial batch of an epoch is filled from the next epoch.
"""

from configs import common
from configs.common import Published, Variant

README = "Deep-Expander-Networks README: best of 300 epochs on the test set"
LOG = "Deep-Expander-Networks training log"


def _variant(depth, growth, parameters, published, compress=0, wired=True):
    """The networks of the published logs: output-side sampling (specs 9.3).

    Their transitions are dense in 40-24-2 and 40-36-2, expanders in the wider two.
    """
    net = {"name": "densenet", "depth": depth, "growth": growth}
    if compress:
        net |= {"wiring": "expander", "compress": compress, "sampling": "per_output"}
        net |= {"wired_transitions": wired}
    return Variant(net, parameters, published)


def _expander(error10, error100, printed):
    return {
        "cifar10": Published(error10, "best", README, printed),
        "cifar100": Published(error100, "best", README, printed),
    }


def _dense(best10, best100=None):
    published = {"cifar10": Published(best10, "best", LOG)}
    if best100 is not None:
        published["cifar100"] = Published(best100, "best", LOG)
    return published


VARIANTS = {
    "40-24-2": _variant(
        40,
        24,
        {"cifar10": 375_850, "cifar100": 399_700},
        _expander(5.17, 25.63, "0.4M"),
        compress=2,
        wired=False,
    ),
    "40-36-2": _variant(
        40,
        36,
        {"cifar10": 835_066, "cifar100": 870_796},
        _expander(5.02, 23.31, "0.75M"),
        compress=2,
        wired=False,
    ),
    "40-48-2": _variant(
        40,
        48,
        {"cifar10": 1_380_682, "cifar100": 1_428_292},
        _expander(4.52, 22.3, "1.4M"),
        compress=2,
    ),
    "40-60-2": _variant(
        40,
        60,
        {"cifar10": 2_148_490, "cifar100": 2_207_980},
        _expander(4.29, 21.47, "2.15M"),
        compress=2,
    ),
    "40-24": _variant(40, 24, {"cifar10": 690_346, "cifar100": 714_196}, _dense(5.21)),
    "40-36": _variant(40, 36, {"cifar10": 1_542_682, "cifar100": 1_578_412}, _dense(4.74, 22.16)),
    "40-48": _variant(40, 48, {"cifar10": 2_733_130, "cifar100": 2_780_740}, _dense(4.36, 20.97)),
    "40-60": _variant(40, 60, {"cifar10": 4_261_690, "cifar100": 4_321_180}, _dense(4.09, 20.13)),
    # Ours: what `make run` trains, a few minutes on two cores.
    "22-8-2": _variant(22, 8, {"digits": 17_418}, {}, compress=2),
}


def get_config(argument: str = ""):
    variant, data = common.parse(argument, VARIANTS, default="40-24-2,cifar10")
    config = common.base()
    config.variant = variant
    with config.unlocked():
        config.net.depth = 40
        config.net.growth = 24
        config.net.reduction = 0.5  # share of the maps that a transition keeps
        config.net.bottleneck = True
        config.net.dropout = 0.0
        config.net.wired_transitions = True  # or dense ones
    config.net.update(VARIANTS[variant].net)
    config.net.num_classes = common.NUM_CLASSES[data]
    config.data.name = data
    config.train.update(batch_size=64, epochs=300.0)
    config.optimizer.update(drop_epochs=(150.0, 225.0), min_learning_rate=0.0005)
    if data == "digits":
        _digits(config)
    return config


def _digits(config):
    """1,437 images of digits: few and easy, and a mirrored digit is another one."""
    config.data.flip = False
    config.data.pad = 2
    config.train.update(batch_size=32, epochs=12.0, log_every_steps=20)
    config.optimizer.update(drop_epochs=(8.0, 11.0))
    config.eval.every_epochs = 3.0

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


def _variant(net, parameters, errors, source=README, printed=""):
    """parameters, errors: for CIFAR-10 and CIFAR-100; None where nothing is known."""
    data = ("cifar10", "cifar100")
    published = {
        name: Published(error, "best", source, printed)
        for name, error in zip(data, errors, strict=True)
        if error is not None
    }
    return Variant(net, dict(zip(data, parameters, strict=True)), published)


def _dense(growth):
    return {"depth": 40, "growth": growth}


def _expander(growth, wired_transitions):
    """As the published logs print them, with output-side sampling (their history)."""
    net = {"wiring": "expander", "compress": 2, "sampling": "per_output"}
    return _dense(growth) | net | {"wired_transitions": wired_transitions}


VARIANTS = {
    "40-24-2": _variant(
        _expander(24, False), (375_850, 399_700), (5.17, 25.63), printed="0.4M"
    ),
    "40-36-2": _variant(
        _expander(36, False), (835_066, 870_796), (5.02, 23.31), printed="0.75M"
    ),
    "40-48-2": _variant(
        _expander(48, True), (1_380_682, 1_428_292), (4.52, 22.3), printed="1.4M"
    ),
    "40-60-2": _variant(
        _expander(60, True), (2_148_490, 2_207_980), (4.29, 21.47), printed="2.15M"
    ),
    "40-24": _variant(_dense(24), (690_346, 714_196), (5.21, None), LOG),
    "40-36": _variant(_dense(36), (1_542_682, 1_578_412), (4.74, 22.16), LOG),
    "40-48": _variant(_dense(48), (2_733_130, 2_780_740), (4.36, 20.97), LOG),
    "40-60": _variant(_dense(60), (4_261_690, 4_321_180), (4.09, 20.13), LOG),
    # Ours: what `make run` trains, a few minutes on two cores.
    "22-8-2": Variant(
        {"depth": 22, "growth": 8, "wiring": "expander", "sampling": "per_output"},
        {"digits": 17_418},
    ),
}


def get_config(argument: str = ""):
    variant, data = common.parse(argument, VARIANTS, default="40-24-2,cifar10")
    config = common.base()
    config.variant = variant
    with config.unlocked():
        config.net.name = "densenet"
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

"""X-VGG for 32x32 images (Deep Expander Networks, arXiv 1711.08757).

python main.py --config=configs/xvgg.py --workdir=/tmp/run
python main.py --config=configs/xvgg.py:16-bn --workdir=/tmp/run

A variant is a depth, with -bn for batch norm and -expander for expander layers; without
-expander it is the dense twin. The learning rate is halved every 30 epochs, as in the
logs; README and run script would double it (decaylevel 2).
"""

from configs import common
from configs.common import Published, Variant

LOG = "Deep-Expander-Networks training log: best of 300 epochs on the test set"
SUFFIXES = ("", "-expander", "-bn", "-bn-expander")
COUNTS = {  # parameters, in the order of SUFFIXES
    11: (9_488_266, 1_233_802, 9_493_770, 1_239_178),
    13: (9_672_778, 1_279_882, 9_678_666, 1_285_642),
    16: (14_982_474, 754_762, 14_990_922, 763_082),
    19: (20_292_170, 2_606_986, 20_303_178, 2_617_866),
}
ERRORS = {"16-bn": 6.00, "16-bn-expander": 6.93}


def _variant(depth, suffix, parameters):
    net = dict(depth=depth, batch_norm="-bn" in suffix)
    if suffix.endswith("-expander"):
        # Degrees are those in nets/vgg.py; the log has the latest code's sampling rule.
        net |= dict(wiring=dict(kind="expander", sampling="smaller_side"))
    error = ERRORS.get(f"{depth}{suffix}")
    published = {"cifar10": Published(error, "best", LOG)} if error else {}
    return Variant(net, {"cifar10": parameters}, published)


VARIANTS = {
    f"{depth}{suffix}": _variant(depth, suffix, count)
    for depth, counts in COUNTS.items()
    for suffix, count in zip(SUFFIXES, counts, strict=True)
}


def get_config(argument: str = ""):
    config = common.select(
        argument,
        VARIANTS,
        "16-bn-expander",
        name="vgg",
        depth=16,
        batch_norm=True,
        published_degrees=True,  # False: in // compress
        norm_scale="uniform",  # initial scales from U(0, 1), as in torch 0.3; or ones
    )
    config.train.update(batch_size=128, epochs=300.0, last_batch="partial")
    config.optimizer.update(
        learning_rate=0.05,
        drop_epochs=tuple(30.0 * i for i in range(1, 10)),
        drop_factor=0.5,
        min_learning_rate=0.0005,
        weight_decay=5e-4,
    )
    return common.apply_recipe(config)

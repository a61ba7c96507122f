"""cfmz: the CIFAR residual networks of He et al. 2015 as trained on neon 1.2.1.

python main.py --config=configs/cfmz.py --workdir=/tmp/run
python main.py --config=configs/cfmz.py:56,cifar10 --workdir=/tmp/run

A variant is a depth. A shorter run needs --config.train.epochs=10 and
--config.optimizer.drop_epochs='(5.0,7.5)'.
Deviation: each epoch is a full permutation; neon shuffled within macrobatches.
"""

from configs import common
from configs.common import Published, Variant

SOURCE = "cfmz README: last of 180 epochs, one run"


def _variant(depth, parameters, error=None):
    published = {"cifar10": Published(error, "last", SOURCE)} if error else {}
    net = {"name": "cfmz_resnet", "depth": depth}
    return Variant(net, {"cifar10": parameters}, published)


VARIANTS = {
    "20": _variant(20, 269_732, 8.29),
    "32": _variant(32, 464_164, 7.26),
    "44": _variant(44, 658_596),  # not in cfmz
    "56": _variant(56, 853_028, 6.31),
    "110": _variant(110, 1_727_972, 6.00),
    "1202": _variant(1202, 19_421_284),  # not in cfmz
}


def get_config(argument: str = ""):
    config = common.select(argument, VARIANTS, "20")
    config.data.border = "mean"
    config.data.std = (1.0, 1.0, 1.0)  # neon subtracts the mean only
    # neon fills the last batch of an epoch from the next one, which starts after it.
    config.train.update(batch_size=128, epochs=180.0, last_batch="fill")
    config.optimizer.update(
        drop_epochs=(90.0, 135.0), nesterov=False, rate_in_velocity=True
    )
    return common.apply_recipe(config)

"""fb.resnet.torch: the classical baselines that DelugeNets and GUNN start from.

python main.py --config=configs/fb_resnet.py --workdir=/tmp/run
python main.py --config=configs/fb_resnet.py:preresnet-110,cifar100 --workdir=/tmp/run

A variant is a network and its depth: 6 n + 2 for CIFAR, 18 to 200 for ImageNet.
Shortcuts are of type A on CIFAR and B on ImageNet; --config.net.shortcut=C changes it.
The code publishes no results for CIFAR; the errors come from the paper that it follows.
"""

from configs import common
from configs.common import Published, Variant
from configs.data_sets import IMAGENET

HE = "He et al. 2015, table 6, not this code; 110: best of 5 runs"
README = "fb.resnet.torch README: validation error, single 224 crop"
# Parameters with 10 classes, equal for pre- and post-activation, and the error.
CIFAR = {
    "20": (269_722, 8.75),
    "32": (464_154, 7.51),
    "44": (658_586, 7.17),
    "56": (853_018, 6.97),
    "110": (1_727_962, 6.43),
    "164": (2_602_906, None),
    "1202": (19_421_274, 7.93),
}
IMAGENET_ROWS = {  # parameters, top-1 and top-5 error
    "resnet-18": (11_689_512, 30.43, 10.76),
    "resnet-34": (21_797_672, 26.73, 8.74),
    "resnet-50": (25_557_032, 24.01, 7.02),
    "resnet-101": (44_549_160, 22.44, 6.21),
    "resnet-152": (60_192_808, 22.16, 6.16),
    "preresnet-18": (11_687_720, None, None),
    "preresnet-34": (21_795_880, None, None),
    "preresnet-50": (25_549_352, None, None),
    "preresnet-101": (44_541_480, None, None),
    "preresnet-152": (60_185_128, None, None),
    "preresnet-200": (64_666_152, 21.66, 5.79),
}


def _net(name, form, shortcut):
    network, depth = name.split("-")
    net = dict(name="resnet", depth=int(depth), form=form, shortcut=shortcut)
    return net | {"preactivation": network == "preresnet"}


def _cifar(name, parameters, error):
    counts = {"cifar10": parameters, "cifar100": parameters + 90 * 65}
    published = {"cifar10": Published(error, "last", HE)} if error else {}
    return Variant(_net(name, "cifar", "A"), counts, published)


def _imagenet(name, parameters, top1, top5):
    published = {IMAGENET: Published(top1, "best", README, top5=top5)} if top1 else {}
    return Variant(_net(name, "imagenet", "B"), {IMAGENET: parameters}, published)


VARIANTS = {
    **{f"resnet-{depth}": _cifar(f"resnet-{depth}", *CIFAR[depth]) for depth in CIFAR},
    **{
        f"preresnet-{depth}": _cifar(f"preresnet-{depth}", count, None)
        for depth, (count, _) in CIFAR.items()
    },
    **{name: _imagenet(name, *row) for name, row in IMAGENET_ROWS.items()},
}


def get_config(argument: str = ""):
    config = common.select(argument, VARIANTS, "resnet-20")
    data = config.data.name
    config.data.border = "dataset_mean"  # zeros after normalisation
    # Two GPUs, for ImageNet four, each with its own statistics of 64 images.
    config.train.update(
        batch_size=128, epochs=164.0, last_batch="partial", batch_norm_groups=2
    )
    config.optimizer.update(drop_epochs=(80.0, 121.0))
    if data == IMAGENET:
        config.augment.update(common.COLORS)
        config.train.update(batch_size=256, epochs=90.0, batch_norm_groups=4)
        config.optimizer.update(drop_epochs=(30.0, 60.0))
    return common.apply_recipe(config)

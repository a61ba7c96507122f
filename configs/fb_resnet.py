"""fb.resnet.torch: the classical baselines that DelugeNets and GUNN start from.

python main.py --config=configs/fb_resnet.py --workdir=/tmp/run
python main.py --config=configs/fb_resnet.py:preresnet-110,cifar100 --workdir=/tmp/run

A variant is a network and its depth: 6 n + 2 for CIFAR, 18 to 200 for ImageNet. The
shortcut is A on CIFAR, B on ImageNet; --config.net.shortcut=C changes it.
"""

from configs import common
from configs.common import Published, Variant

README = "fb.resnet.torch README: validation error, single 224 crop"
# Parameters of type A with 10 classes, the same pre- and post-activation.
CIFAR = {
    20: 269_722,
    32: 464_154,
    44: 658_586,
    56: 853_018,
    110: 1_727_962,
    1202: 19_421_274,
}
IMAGENET = {  # parameters of type B, top-1 and top-5 error
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


def _net(network, depth, form, shortcut):
    preactivation = network == "preresnet"
    net = dict(name="resnet", depth=depth, form=form, shortcut=shortcut)
    return net | {"preactivation": preactivation}


def _cifar(network, depth):
    counts = {"cifar10": CIFAR[depth], "cifar100": CIFAR[depth] + 90 * 65}
    return Variant(_net(network, depth, "cifar", "A"), counts)


def _imagenet(name, parameters, top1, top5):
    network, depth = name.split("-")
    published = {}
    if top1:
        published["imagenet2012"] = Published(top1, "best", README, top5=top5)
    net = _net(network, int(depth), "imagenet", "B")
    return Variant(net, {"imagenet2012": parameters}, published)


VARIANTS = {
    f"{network}-{depth}": _cifar(network, depth)
    for network in ("resnet", "preresnet")
    for depth in CIFAR
} | {name: _imagenet(name, *row) for name, row in IMAGENET.items()}


def get_config(argument: str = ""):
    config = common.select(argument, VARIANTS, "resnet-20")
    data = config.data.name
    config.data.border = "dataset_mean"  # zeros after normalisation
    # Two GPUs, for ImageNet four, each with the statistics of its 64 images.
    config.train.update(batch_size=128, epochs=164.0, last_batch="partial")
    config.train.update(sync_batch_norm=False, batch_norm_group=64)
    config.optimizer.update(drop_epochs=(80.0, 121.0))
    if data == common.IMAGENET:
        config.augment.update(common.COLORS)
        config.train.update(batch_size=256, epochs=90.0)
        config.optimizer.update(drop_epochs=(30.0, 60.0))
    return common.with_recipe(config)

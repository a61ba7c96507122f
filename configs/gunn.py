"""GUNN, Gradually Updated Neural Networks (arXiv 1711.09280).

python main.py --config=configs/gunn.py --workdir=/tmp/run
python main.py --config=configs/gunn.py:15,cifar100 --workdir=/tmp/run

A variant is a depth. 15 and 18 are published as code. We derived wide-18 from its
parameter count, and 24 and 24-identity (the shortcut of the second bottleneck is a
projection or the identity) from the paper's text and the count. The published 29.6M
fits 24 with 10 classes and 24-identity with 100.
"""

from configs import common
from configs.common import Published, Variant
from configs.data_sets import IMAGENET

README = "GUNN README: best of all epochs on the test set"
DERIVED = f"{README}; the net is derived, not published"

SEGMENTS = (20, 25, 30)
CIFAR_15 = dict(channels=(240, 300, 360), segments=SEGMENTS, shortcuts=("projection",))


def _24(second_shortcut, *parameters):
    net = dict(channels=(720, 900, 1080), segments=SEGMENTS, expansion=3)
    net["shortcuts"] = ("projection", second_shortcut)
    return common.cifar_variant(net, parameters, (3.21, 16.69), DERIVED, "29.6M")


def _imagenet(channels, parameters, top1, top5, source, printed):
    segments = tuple(count // 40 for count in channels)
    net = dict(channels=channels, segments=segments, form="imagenet")
    net["shortcuts"] = ("none",)
    published = Published(top1, "best", source, printed, top5)
    return Variant(net, {IMAGENET: parameters}, {IMAGENET: published})


VARIANTS = {
    "15": common.cifar_variant(
        CIFAR_15, (1_585_746, 1_618_236), (4.15, 20.45), README, "1.6M"
    ),
    "18": _imagenet((400, 800, 1600, 2000), 28_909_736, 21.65, 5.87, README, "28.9M"),
    "wide-18": _imagenet(
        (1200, 1600, 2000, 2000), 45_624_936, 20.59, 5.52, DERIVED, "45.6M"
    ),
    "24": _24("projection", 29_636_706, 29_733_996),
    "24-identity": _24("identity", 29_534_106, 29_631_396),
}


def get_config(argument: str = ""):
    config = common.select(
        argument,
        VARIANTS,
        "15",
        name="gunn",
        form="cifar",  # or imagenet: stem, position of the pools, end
        expansion=2,  # inner width of a bottleneck over the width of its segment
        order="gradual",  # or simultaneous, the paper's control
    )
    data = config.data.name
    config.data.border = "dataset_mean"  # zeros after normalisation
    config.augment.jigsaw = True  # in the code, not in the paper
    # Four GPUs, each with its own statistics.
    config.train.update(
        batch_size=64, epochs=300.0, last_batch="partial", batch_norm_groups=4
    )
    # The original drops the rate at the start of epochs 150 and 225, counting from 1.
    config.optimizer.update(drop_epochs=(149.0, 224.0))
    if data == IMAGENET:
        config.augment.update(common.COLORS, jigsaw=False)
        config.train.update(batch_size=256, epochs=120.0)
        # The code skips 1e-4: from 1e-3 to 1e-5.
        config.optimizer.update(drop_epochs=(30.0, 60.0, 90.0, 90.0))
    return common.apply_recipe(config)

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

CIFAR_15 = {"channels": (240, 300, 360), "segments": (20, 25, 30)}
CIFAR_24 = {"channels": (720, 900, 1080), "segments": (20, 25, 30), "expansion": 3}


def _imagenet(channels, segments, parameters, errors, source, printed):
    net = dict(channels=channels, segments=segments, form="imagenet")
    top1, top5 = errors
    published = Published(top1, "best", source, printed, top5)
    return Variant(
        net | {"shortcuts": ("none",)},
        {IMAGENET: parameters},
        {IMAGENET: published},
    )


VARIANTS = {
    "15": common.cifar_variant(
        CIFAR_15 | {"shortcuts": ("projection",)},
        (1_585_746, 1_618_236),
        (4.15, 20.45),
        README,
        "1.6M",
    ),
    "18": _imagenet(
        (400, 800, 1600, 2000),
        (10, 20, 40, 50),
        28_909_736,
        (21.65, 5.87),
        README,
        "28.9M",
    ),
    "wide-18": _imagenet(
        (1200, 1600, 2000, 2000),
        (30, 40, 50, 50),
        45_624_936,
        (20.59, 5.52),
        DERIVED,
        "45.6M",
    ),
    "24": common.cifar_variant(
        CIFAR_24 | {"shortcuts": ("projection", "projection")},
        (29_636_706, 29_733_996),
        (3.21, 16.69),
        DERIVED,
        "29.6M",
    ),
    "24-identity": common.cifar_variant(
        CIFAR_24 | {"shortcuts": ("projection", "identity")},
        (29_534_106, 29_631_396),
        (3.21, 16.69),
        DERIVED,
        "29.6M",
    ),
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

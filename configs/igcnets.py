"""IGCNets: interleaved group convolutions (arXiv 1707.02725), and their regular twins.

python main.py --config=configs/igcnets.py --workdir=/tmp/run
python main.py --config=configs/igcnets.py:plain-20-L16M32,cifar100 --workdir=/tmp/run

A variant is family-depth-LxMy for x partitions of y channels in the first stage, or
family-depth-Wx for a regular net of width x. The default is the README's command for
CIFAR; imagenet-* are the README's table (depth 18).
Errors marked "last" are not selected. ImageNet errors are from epoch 95 of 120; the
epoch of the others is not published.
"""

from configs import common
from configs.common import Published, Variant
from configs.data_sets import DATA_SETS, IMAGENET

README = "IGCNets README: ImageNet validation, single centre crop, epoch 95 of 120"
PAPER = "IGCNets paper, not verified"
SVHN = "svhn_cropped_extra"
DATA = ("cifar10", "cifar100", SVHN)

# Parameters with 10 classes, in the order of SMALL.
SMALL = ("W16", "W18", "L4M8", "L24M2")
COUNTS = {
    "plain-8": (75_290, 95_068, 78_634, 48_442),
    "plain-20": (269_722, 341_020, 277_546, 155_962),
    "plain-38": (561_370, 709_948, 575_914, 317_242),
    "plain-62": (950_234, 1_201_852, 973_738, 532_282),
    "resnet-20": (272_474, 344_476, 281_258, 164_410),
    "resnet-50": (758_554, 959_356, 778_538, 433_210),
    "resnet-74": (1_147_418, 1_451_260, 1_176_362, 648_250),
    "resnet-98": (1_536_282, 1_943_164, 1_574_186, 863_290),
}
CIFAR = {
    f"{net}-{size}": count
    for net, counts in COUNTS.items()
    for size, count in zip(SMALL, counts, strict=True)
} | {
    "plain-20-L16M32": 17_527_306,
    "plain-20-L450M2": 19_026_910,
    "plain-20-L32M26": 23_829_322,
    "resnet-20-L16M32": 17_746_442,
    "resnet-20-L450M2": 21_485_710,
    "resnet-20-L32M26": 24_215_370,
    # Canonical in widening blocks too, unlike the original (nets/plain.py).
    "resnet-20-L24M2-canonical": 157_498,
}
# The paper's errors, in the order of DATA, and its parameter count.
ERRORS = {
    "plain-20-W16": ((7.45, 31.29), ""),
    "plain-38-W16": ((8.43, 35.00), ""),
    "plain-62-W16": ((11.40, 41.48), ""),
    "plain-20-L24M2": ((7.16, 29.46), ""),
    "plain-38-L24M2": ((7.76, 30.44), ""),
    "plain-62-L24M2": ((9.97, 34.16), ""),
    # The parameter counts show that the paper's large nets have no shortcuts.
    "plain-20-L16M32": ((3.37, 19.31, 1.63), "17.7M"),
    "plain-20-L450M2": ((3.25, 19.25), "19.3M"),
    "plain-20-L32M26": ((3.31, 18.75, 1.56), "24.1M"),
}
# Our parameters; the README's top-1 and top-5 error, parameters and operations. The
# README omits some parameters; we count all.
IMAGENET_ROWS = {
    "imagenet-W64": (11_689_512, 31.06, 11.38, "11.151M", "1.8G"),
    "imagenet-W69": (13_542_457, 30.58, 10.77, "11.333M", "2.1G"),
    "imagenet-L4M32": (12_251_240, 30.77, 10.99, "11.205M", "1.9G"),
    "imagenet-L16M16": (13_528_296, 29.40, 10.32, "11.329M", "2.2G"),
    "imagenet-L100M2": (8_637_900, 26.95, 8.92, "8.61M", "1.3G"),
}
NETS = {"plain": "plain", "resnet": "igc_resnet"}


def _width(size: str) -> dict:
    """Returns the net's fields for 'W16' or 'L4M8': width and wiring."""
    if size[0] == "W":
        return dict(width=int(size[1:]))
    primary, members = map(int, size[1:].split("M"))
    wiring = dict(kind="interleaved", primary_groups=primary)
    return dict(width=primary * members, wiring=wiring)


def _cifar(name: str) -> Variant:
    family, depth, size, *canonical = name.split("-")
    net = dict(name=NETS[family], depth=int(depth)) | _width(size)
    if canonical:
        net["transition_secondary"] = "new"
    errors, printed = ERRORS.get(name, ((), ""))
    published = {
        data: Published(error, "last", PAPER, printed)
        for data, error in zip(DATA, errors, strict=False)
    }
    more = 90 * (4 * net["width"] + 1)  # classifier parameters with 100 classes
    return Variant(
        net, {d: CIFAR[name] + more * (d == "cifar100") for d in DATA}, published
    )


def _imagenet(name: str) -> Variant:
    size = name.removeprefix("imagenet-")
    net = dict(name="igc_resnet_imagenet", depth=18) | _width(size)
    if size == "L100M2":  # doubles the partitions, from the first stage on
        wiring = dict(kind="interleaved", primary_groups=0, secondary_groups=2)
        net |= dict(width=100, expand_first_stage=True, wiring=wiring)
    parameters, top1, top5, printed, macs = IMAGENET_ROWS[name]
    published = Published(top1, "last", README, printed, top5, macs)
    return Variant(net, {IMAGENET: parameters}, {IMAGENET: published})


VARIANTS = {name: _cifar(name) for name in CIFAR}
VARIANTS |= {name: _imagenet(name) for name in IMAGENET_ROWS}
# The original's normalisation on the scale 0..255, in the order red, green, blue. For
# ImageNet it comes from images with a shorter side of 480.
MEAN_AND_STD = {
    "cifar10": ((125.307, 122.950, 113.865), (62.993, 62.089, 66.705)),
    "cifar100": ((129.304, 124.070, 112.434), (68.170, 65.392, 70.418)),
    "svhn_cropped": ((111.609, 113.161, 120.565), (50.498, 51.259, 50.244)),
    IMAGENET: ((123.370, 112.757, 99.406), (68.998, 66.093, 68.292)),
}
EPOCHS_AND_MILESTONES = {
    "svhn_cropped": (40, (20, 30, 35)),
    IMAGENET: (120, (30, 60, 90)),
}


def get_config(argument: str = ""):
    config = common.select(
        argument,
        VARIANTS,
        "plain-38-L24M2",
        initial_var=0.0,  # of running variances; MXNet's default is 1
    )
    data = config.data.name
    # The pad operator of the authors' MXNet has a fill colour since 2016-11-22
    # (zlmzju/mxnet, commit 12857d1d).
    config.data.border = "dataset_mean"
    name = data.removesuffix("_extra")
    if name in MEAN_AND_STD:
        mean, std = MEAN_AND_STD[name]
        config.data.recipe.update(mean=mean, std=std)
    if data.startswith("svhn"):
        config.data.pad = 0  # with flip=False: no augmentation at all
    if data == IMAGENET:
        config.data.crop = "scale_aspect"
        config.augment.hls = (36, 50, 50)
    epochs, milestones = EPOCHS_AND_MILESTONES.get(name, (400, (200, 300, 350)))
    # Two GPUs for a batch of 64, eight for 256 on ImageNet.
    batch_size, gpus = (256, 8) if data == IMAGENET else (64, 2)
    # MXNet fills the last batch of an epoch from the next one, which starts after it.
    config.train.update(
        epochs=float(epochs),
        batch_size=batch_size,
        batch_norm_groups=gpus,
        last_batch="fill",
    )
    images = DATA_SETS[data].num_train
    whole = images // batch_size * batch_size  # milestones count only full batches
    config.optimizer.drop_epochs = tuple(x * whole / images for x in milestones)
    return common.apply_recipe(config)

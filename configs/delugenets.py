"""DelugeNets (arXiv 1611.05552): six nets, CIFAR-10, CIFAR-100 and ImageNet.

python main.py --config=configs/delugenets.py --workdir=/tmp/run
python main.py --config=configs/delugenets.py:wide-146,cifar100 --workdir=/tmp/run

A variant is the published name: 3 x composite layers + 2, without transitions.
Compiling each program takes minutes on CPU because the blocks are unrolled.
"""

from configs import common
from configs.common import Published, Variant
from configs.data_sets import IMAGENET

README = "DelugeNets README: best epoch on the test set"


def _cifar(layers, parameters, errors, printed, width=1.0):
    net = {"name": "delugenet", "layers": layers, "width": width, "form": "cifar"}
    return common.cifar_variant(net, parameters, errors, README, printed)


def _imagenet(layers, parameters, top1, top5, size, operations):
    """size, operations: as printed; the operations are slightly over twice our MACs."""
    row = Published(top1, "best", f"{README}, single 224 crop", size, top5, operations)
    net = {"name": "delugenet", "layers": layers, "width": 1.0, "form": "imagenet"}
    return Variant(net, {IMAGENET: parameters}, {IMAGENET: row})


VARIANTS = {
    "146": _cifar((8, 16, 24), (6_686_250, 6_709_380), (3.98, 19.72), "6.7M"),
    "218": _cifar((12, 24, 36), (9_981_738, 10_004_868), (3.88, 19.31), "10.0M"),
    "wide-146": _cifar(
        (8, 16, 24), (20_150_658, 20_191_068), (3.76, 19.02), "20.2M", width=1.75
    ),
    "92": _imagenet((7, 7, 8, 8), 43_404_072, 22.05, 6.03, "43.4M", "11.8G"),
    "104": _imagenet((7, 8, 9, 10), 51_353_896, 21.86, 5.98, "51.4M", "13.2G"),
    "122": _imagenet((7, 9, 11, 13), 63_620_392, 21.53, 5.86, "63.6M", "15.2G"),
}


def get_config(argument: str = ""):
    config = common.select(
        argument,
        VARIANTS,
        "146",
        cross_layer=True,  # False: our control, a chain of layers
    )
    data = config.data.name
    config.data.border = "dataset_mean"  # zeros after normalisation
    config.train.update(batch_size=64, epochs=300.0, last_batch="partial")
    # The original drops the rate at the start of epochs 150 and 225, counting from 1.
    config.optimizer.update(drop_epochs=(149.0, 224.0))
    if data == IMAGENET:
        config.augment.update(common.COLORS)
        # Eight GPUs, each with its own statistics of 32 images.
        config.train.update(batch_size=256, epochs=100.0, batch_norm_groups=8)
        config.optimizer.update(drop_epochs=(30.0, 60.0, 90.0))
    return common.apply_recipe(config)

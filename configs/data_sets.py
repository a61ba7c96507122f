"""Facts about the data sets that have a recipe.

Other data sets need no row; their size and statistics are computed when loading.
"""

import dataclasses

CIFAR = ("cifar10", "cifar100")
IMAGENET = "imagenet2012"


@dataclasses.dataclass(frozen=True)
class DataSet:
    """One data set.

    image_size: rows and columns of the nets' input.
    num_train: number of training images, for milestones that a recipe counts in steps.
    mean, std: normalisation per channel, on the scale 0..255; () to compute the exact
      values from the training images.
    flip: whether mirrored images keep their class; digits do not.
    """

    num_classes: int
    image_size: int
    num_train: int
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    flip: bool = True


DATA_SETS = {
    # CIFAR: the constants of X-Nets, rounded from the official images.
    "cifar10": DataSet(10, 32, 50_000, (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)),
    "cifar100": DataSet(100, 32, 50_000, (129.3, 124.1, 112.4), (68.2, 65.4, 70.4)),
    "digits": DataSet(10, 32, 1_437, (77.9,) * 3, (82.6,) * 3, flip=False),
    # fb.resnet.torch and torchvision: 0.485, 0.456, 0.406 and 0.229, 0.224, 0.225.
    IMAGENET: DataSet(
        1000, 224, 1_281_167, (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    ),
    "svhn_cropped": DataSet(10, 32, 73_257, flip=False),
    "svhn_cropped_extra": DataSet(10, 32, 604_388, flip=False),  # train and extra
}

"""Every field of a configuration, with what it means; the families fill in theirs."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from configs.data_sets import CIFAR, DATA_SETS, IMAGENET

# The original's training, or ours of the same net: docs/recipes.md.
RECIPES = ("faithful", "modern")
# config.augment of fb.resnet.torch for ImageNet.
COLORS = {"jitter": 0.4, "lighting": 0.1}


@dataclasses.dataclass(frozen=True)
class Published:
    """A table row of a paper or README, as printed there.

    error: test error in percent; selection: 'best' of all epochs on the test set, or
    the 'last' epoch. parameters, macs: the printed figures, where there are any.
    top5: the top-5 error of the same epoch.
    """

    error: float
    selection: str
    source: str
    parameters: str = ""
    top5: float | None = None
    macs: str = ""


@dataclasses.dataclass(frozen=True)
class Variant:
    """A row of a family's VARIANTS: the net's fields, and what was published of it.

    parameters: exact number of existing parameters (specification, or our count where
    nothing is published), by data set; tests/variants_test.py holds them.
    """

    net: Mapping[str, Any]
    parameters: Mapping[str, int]
    published: Mapping[str, Published] = dataclasses.field(default_factory=dict)


def cifar(
    net, parameters, errors=(None, None), source="", printed="", macs=""
) -> Variant:
    """A row for CIFAR-10 and -100: two parameter counts, two best errors.

    None: not known, or, of a count, that the net is no row of that table.
    """
    counts, published = {}, {}
    for data, count, error in zip(CIFAR, parameters, errors, strict=True):
        if count is not None:
            counts[data] = count
        if error is not None:
            published[data] = Published(error, "best", source, printed, macs=macs)
    return Variant(net, counts, published)


def base() -> ConfigDict:
    """The defaults. Overrides keep the type that a field has here."""
    config = ConfigDict()
    config.seed = 0  # initial weights, order of examples, augmentation
    config.seeds = 1  # runs, one seed after the other, in WORKDIR/seed0, ...
    config.variant = ""  # row of the family's VARIANTS, for the record
    config.recipe = ""  # one of RECIPES, for the record

    config.net = ConfigDict(
        dict(
            name="",  # nets.names()
            num_classes=10,
            graph_seed=0,  # expander graphs are a function of it and the layer's path
            lowering="auto",  # of every convolution: nets/layers/lowerings.py
            wiring="dense",  # or expander, grouped, interleaved: nets/layers/wiring.py
            compress=2,  # expander: a sampling channel keeps in // compress partners
            sampling="smaller_side",  # expander: or per_output, per_input
            groups=2,  # grouped
            primary_groups=2,  # interleaved; 0: output channels / secondary_groups
            secondary_groups=0,  # interleaved; 0: output channels / primary_groups
        )
    )
    config.data = ConfigDict(
        dict(
            # A TFDS set, 'digits' (embedded), or the name or path of a folder of class
            # folders (folders.py) or of an .npz.
            name="cifar10",
            dir="",  # '': $TFDS_DATA_DIR or ~/tensorflow_datasets
            download=False,  # the network is used only when asked
            cache_dir="",  # decoded images; '': wirings in $XDG_CACHE_HOME, ~/.cache
            pipeline="tf.data",  # or 'device': images and augmentation on the device
            crop="pad",  # and read into memory; or photographs by one of crops.CROPS
            pad=4,  # crop='pad': pixels a side before the random crop; 0: no crop
            border="zero",  # crop='pad': what fills them: augment.BORDERS
            image_size=224,  # rows and columns of a photograph's crop
            on_error="raise",  # pictures that cannot be decoded; or 'skip', counted
            flip=True,  # horizontally, with probability 1/2
            mean=(),  # per channel, 0..255; (): the data set's own (data_sources.py)
            std=(),
            # The data set that the recipe is for, and its normalisation while data.name
            # is that set.
            recipe=dict(name="", mean=(), std=()),
            # Normalisation of photographs of any other set.
            photograph_mean=DATA_SETS[IMAGENET].mean,
            photograph_std=DATA_SETS[IMAGENET].std,
        )
    )
    config.augment = ConfigDict(  # within the train step, after crop and flip
        dict(
            jigsaw=False,  # GUNN: random cyclic shift
            jitter=0.0,  # fb.resnet.torch: brightness, contrast, saturation (0.4)
            lighting=0.0,  # standard deviation along the colours' axes (0.1)
            hls=(),  # IGC: largest change of hue, lightness, saturation (36, 50, 50)
            autoaugment=False,  # the policies found for CIFAR-10
            randaugment_ops=0,  # operations an image; 0: none
            randaugment_magnitude=9.0,  # of 30
            cutout=0,  # side of the grey square, in pixels; 0: none
            # One of mixup, cutmix and ricap: the parameter of its Beta distribution.
            mixup=0.0,
            cutmix=0.0,
            cutmix_probability=0.5,  # of a batch to be cut at all
            ricap=0.0,
        )
    )
    config.train = ConfigDict(
        dict(
            batch_size=64,  # of all devices together
            last_batch="fill",  # of a pass: from the next one; or partial
            label_smoothing=0.0,  # share of the target given to all classes alike
            ema=0.0,  # decay a step of averaged weights, which are evaluated; 0: off
            epochs=300.0,  # passes over the training images
            steps_per_dispatch=1,  # pipeline='device': steps a call of the device makes
            dtype="float32",  # of the computation; parameters stay float32
            # Equal parts of a batch that have their own statistics, as on so many GPUs;
            # 1: those of the whole batch, on any devices; 0: each device has its own.
            batch_norm_groups=1,
            log_every_steps=100,  # progress line, TensorBoard
            tensorboard=True,  # where TensorFlow is installed
            compilation_cache=True,  # keep compiled programs in the cache directory
        )
    )
    config.optimizer = ConfigDict(
        dict(
            learning_rate=0.1,
            schedule="steps",  # or cosine, one_cycle: optimizers.SCHEDULES
            warmup_epochs=0.0,  # of 'steps' and 'cosine': linear from 0
            drop_epochs=(150.0, 225.0),  # counted from 0; the rate is multiplied there
            drop_factor=0.1,
            min_learning_rate=0.0,
            momentum=0.9,
            nesterov=True,
            rate_in_velocity=False,  # neon: v <- momentum v - rate g (optimizers.py)
            weight_decay=1e-4,  # L2 on every parameter, as all originals do
        )
    )
    config.eval = ConfigDict(
        dict(
            batch_size=250,
            every_epochs=1.0,  # fractions allowed; a checkpoint follows each
            checkpoint="best",  # --mode=eval: best, last or a step
        )
    )
    config.checkpoint = ConfigDict(
        dict(
            keep=2,  # the newest ones, besides the best
            every_steps=0,  # besides those after evaluations; 0: none
        )
    )
    return config


def select(
    argument: str, variants: Mapping[str, Variant], default: str, **fields
) -> ConfigDict:
    """base() for 'variant,data,recipe' of --config=file.py:variant,data,recipe.

    default: the variant, where none is named; the data set is then the first that the
    variant has a parameter count for, and the recipe the faithful one. fields: of the
    family's net, with the defaults.
    Raises ValueError with the choices for an unknown variant, data set or recipe.
    """
    parts = argument.split(",")
    if len(parts) > 3:
        raise ValueError(f"{argument!r} has {len(parts)} parts: variant,data,recipe")
    variant, data, recipe = parts + [""] * (3 - len(parts))
    variant = variant or default
    if variant not in variants:
        raise ValueError(_choices("variant", variant, list(variants)))
    data = data or next(iter(variants[variant].parameters))
    if data not in DATA_SETS:
        raise ValueError(
            _choices("data set", data, list(DATA_SETS))
            + "; any other is named by --config.data.name and --config.net.num_classes"
        )
    recipe = recipe or RECIPES[0]
    if recipe not in RECIPES:
        raise ValueError(_choices("recipe", recipe, list(RECIPES)))
    config = base()
    config.variant, config.recipe = variant, recipe
    with config.unlocked():
        config.net.update(fields | dict(variants[variant].net))
    facts = DATA_SETS[data]
    config.net.num_classes = facts.num_classes
    config.data.update(name=data, flip=facts.flip)
    config.data.recipe.update(name=data, mean=facts.mean, std=facts.std)
    if data == IMAGENET:
        config.data.crop = "inception"
    return config


def with_recipe(config: ConfigDict) -> ConfigDict:
    """A family's faithful configuration, changed in place to what config.recipe says.

    modern: a rate that goes to nothing, the choice of docs/recipes.md.
    """
    if config.recipe == "modern":
        config.optimizer.update(
            schedule="one_cycle",
            min_learning_rate=0.0,
            nesterov=True,
            rate_in_velocity=False,
        )
    return config


def _choices(what: str, given: str, choices: list[str]) -> str:
    nearest = difflib.get_close_matches(given, choices, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    return f"unknown {what} {given!r}: choose from {', '.join(choices)}{hint}"

"""The fields of a configuration, their defaults, and how a family's table selects them.

The comment next to a field explains it.
"""

import dataclasses
import difflib
import importlib
import pathlib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from configs.data_sets import CIFAR, DATA_SETS, IMAGENET

FAMILIES = sorted(
    {path.stem for path in pathlib.Path(__file__).parent.glob("*.py")}
    - {"common", "data_sets"}
)
# The original's training, or our own for the same net (docs/recipes.md).
RECIPES = ("faithful", "modern")
# config.augment of fb.resnet.torch for ImageNet.
COLORS = {"jitter": 0.4, "lighting": 0.1}


@dataclasses.dataclass(frozen=True)
class Published:
    """One row of a table in a paper, README or log, as printed there.

    error: test error in percent. selection: 'best' for the best epoch on the test set,
      'last' for an epoch that was not selected.
    parameters, macs: as printed, '' if not printed.
    top5: the top-5 error of the same epoch.
    note: a remark that analysis.summary prints with the row.
    """

    error: float
    selection: str
    source: str
    parameters: str = ""
    top5: float | None = None
    macs: str = ""
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row of a family's VARIANTS: a net and its published results.

    net: the fields of config.net that differ from the family's defaults.
    parameters: data set -> exact number of stored parameters, tested against the net.
      The first data set is the default one.
    published: data set -> published result.
    """

    net: Mapping[str, Any]
    parameters: Mapping[str, int]
    published: Mapping[str, Published] = dataclasses.field(default_factory=dict)


def cifar_variant(
    net, parameters, errors=(None, None), source="", printed="", macs="", note=""
) -> Variant:
    """Returns a row with parameter counts and best errors for CIFAR-10 and CIFAR-100.

    None as a count: the row does not offer that data set. None as an error: no error
    was published.
    """
    counts, published = {}, {}
    for data, count, error in zip(CIFAR, parameters, errors, strict=True):
        if count is not None:
            counts[data] = count
        if error is not None:
            published[data] = Published(
                error, "best", source, printed, macs=macs, note=note
            )
    return Variant(net, counts, published)


def load_family(name: str):
    """Returns the module configs.NAME; raises ValueError if there is none."""
    _check_choice("family", name, FAMILIES)
    return importlib.import_module(f"configs.{name}")


def base() -> ConfigDict:
    """Returns the defaults, which have the types of the fields.

    runtime/checks.py repeats the types and has the rules for their values.
    """
    config = ConfigDict()
    config.seed = 0  # of initial weights, order of examples and augmentation
    config.seeds = 1  # number of runs, with consecutive seeds, in WORKDIR/seed0, ...
    # Start from the weights of this workdir's best checkpoint, or of another one given
    # as WORKDIR@last or WORKDIR@STEP, or of an original's file. '': random weights.
    config.init_from = ""
    config.variant = ""  # row of the family's VARIANTS, for logs and tables
    config.recipe = ""  # one of RECIPES, for tables

    config.net = dict(
        name="",  # nets.names()
        num_classes=10,
        graph_seed=0,  # of the random graphs of expander layers
        lowering="auto",  # of every convolution: nets/layers/lowerings.py
        # The maps to recompute in the backward pass, which saves memory: none, norm
        # (all but convolutions) or block (all within a block): nets/remat.py.
        remat="none",
        wiring=dict(  # nets/layers/wiring.py
            kind="dense",  # or expander, grouped, interleaved
            compress=2,  # expander: a sampling channel has in // compress partners
            # expander: or per_output, per_input, ramanujan (not random);
            # nets/connectivity.py
            sampling="smaller_side",
            block=1,  # expander: the graph connects blocks of this many channels
            groups=2,  # grouped
            # interleaved; if one of them is 0, it is output channels / the other
            primary_groups=2,
            secondary_groups=0,
        ),
    )
    config.data = dict(
        # A TFDS data set, 'digits' (embedded), an .npz file, or a directory of
        # class directories (data_sources/folders.py).
        name="cifar10",
        dir="",  # location of the files; '': $TFDS_DATA_DIR, ~/tensorflow_datasets
        download=False,  # whether to download a missing TFDS data set
        cache_dir="",  # of decoded images; '': $XDG_CACHE_HOME/wirings, ~/.cache
        # 'auto': 'device' for images in memory, which then stay on the accelerator,
        # and 'threads' for photographs. 'tf.data': for images in memory, which stay
        # on the host (input_pipeline.py).
        pipeline="auto",
        # 'pad': pads and crops images in memory. Any other value: reads photographs
        # of any size from disk and crops them (data_sources/crops.py).
        crop="pad",
        pad=4,  # crop='pad': width of the border in pixels; 0: no random crop
        border="zero",  # crop='pad': or mean, dataset_mean, white, reflect
        image_size=224,  # photographs: height and width of the crop
        on_error="raise",  # on an image that cannot be decoded; or 'skip'
        flip=True,  # mirrors a training image with probability 1/2
        # Normalisation per channel, on the scale 0..255. Empty: the recipe's values
        # if this is the recipe's data set; otherwise photograph_mean and _std for
        # images on disk, or the training set's statistics for images in memory.
        mean=(),
        std=(),
        # The data set that the recipe is for, and its normalisation. Images of this
        # data set and of TFDS are decoded as stored. All others honour EXIF
        # orientation, with transparency over white.
        recipe=dict(name="", mean=(), std=()),
        photograph_mean=DATA_SETS[IMAGENET].mean,
        photograph_std=DATA_SETS[IMAGENET].std,
    )
    config.augment = dict(  # within the train step, after crop and flip
        jigsaw=False,  # GUNN: random cyclic shift
        jitter=0.0,  # brightness, contrast and saturation (fb.resnet.torch: 0.4)
        lighting=0.0,  # std along the principal colour axes (fb.resnet.torch: 0.1)
        hls=(),  # largest change of hue, lightness, saturation (IGC: 36, 50, 50)
        autoaugment=False,  # the policies found for CIFAR-10
        randaugment_ops=0,  # operations per image; 0: off
        randaugment_magnitude=9.0,  # of 30
        cutout=0,  # side of the square in pixels; 0: off
        # At most one of mixup, cutmix and ricap: the parameter of its Beta
        # distribution; 0: off.
        mixup=0.0,
        cutmix=0.0,
        cutmix_probability=0.5,  # share of batches to which CutMix applies
        ricap=0.0,
    )
    config.train = dict(
        batch_size=64,  # over all devices
        # The last batch of an epoch: 'fill' takes the missing images from the next
        # epoch, 'partial' is smaller.
        last_batch="fill",
        label_smoothing=0.0,  # share of a target for all classes alike; 0: off
        ema=0.0,  # decay per step of averaged weights, used in evaluation; 0: off
        epochs=300.0,  # passes over the training images
        steps_per_dispatch=1,  # pipeline='device': train steps per compiled call
        dtype="float32",  # of activations; parameters are always float32
        # Ghost batch norm: splits the batch into this many groups with separate
        # statistics, like the GPUs of the original. 1: statistics of the whole
        # batch, synchronised over devices (SyncBN). 0: per device.
        batch_norm_groups=1,
        log_every_steps=100,  # progress line and TensorBoard
        tensorboard=True,  # whether to write events for TensorBoard
        profile_steps=(),  # (first, last): traces these steps to WORKDIR/profile
        compilation_cache=True,  # stores compiled programs in the cache directory
    )
    config.optimizer = dict(
        name="sgd",  # or adamw: optimizers.OPTIMIZERS
        learning_rate=0.1,
        schedule="steps",  # or cosine, one_cycle: optimizers.SCHEDULES
        warmup_epochs=0.0,  # linear from 0, for 'steps' and 'cosine'
        drop_epochs=(150.0, 225.0),  # 'steps': epochs (from 0) that lower the rate
        drop_factor=0.1,  # 'steps': multiplies the rate at each drop
        min_learning_rate=0.0,
        momentum=0.9,  # momentum, nesterov, rate_in_velocity: of SGD
        nesterov=True,
        rate_in_velocity=False,  # neon: v <- momentum v - rate g (optimizers.py)
        beta1=0.9,  # beta1, beta2, epsilon: of AdamW
        beta2=0.999,
        epsilon=1e-8,
        weight_decay=1e-4,  # sgd: L2; adamw: decoupled, times the learning rate
        # The parameters that decay: 'all', or 'kernels' without batch norm and
        # biases. 'auto': all with sgd, as in all originals; kernels with adamw.
        decay_on="auto",
        clip_norm=0.0,  # largest global norm of a gradient; 0: off
        # Averages the gradients of this many steps for one update. docs/recipes.md
        # explains what this means for batch norm.
        accumulate_steps=1,
    )
    config.eval = dict(
        batch_size=250,
        every_epochs=1.0,  # may be a fraction; a checkpoint follows each evaluation
        checkpoint="best",  # --mode=eval: best, last or a step
        # --mode=eval: 'center': as during training. 'flip': averages the logits of
        # the image and its mirror image. 'tencrop': averages the logits of centre
        # and four corners of a photograph and its mirror image. Results are then
        # named test_accuracy_flip and so on.
        views="center",
    )
    config.checkpoint = dict(
        keep=2,  # number of recent checkpoints to keep, besides the best
        every_steps=0,  # extra checkpoints between evaluations; 0: off
    )
    return config


def select(
    argument: str, variants: Mapping[str, Variant], default: str, **fields
) -> ConfigDict:
    """Returns base() with the choices of --config=file.py:variant,data,recipe.

    Each choice may be empty, which selects `default`, the variant's first data set and
    the faithful recipe. `fields` are the family's defaults of config.net. Raises
    ValueError, which lists the choices, if one is unknown.
    """
    parts = argument.split(",")
    if len(parts) > 3:
        raise ValueError(
            f"{argument!r} has {len(parts)} parts, expected variant,data,recipe"
        )
    variant, data, recipe = parts + [""] * (3 - len(parts))
    variant = variant or default
    _check_choice("variant", variant, variants)
    data = data or next(iter(variants[variant].parameters))
    _check_choice(
        "data set",
        data,
        DATA_SETS,
        ", or any other by --config.data.name and --config.net.num_classes",
    )
    recipe = recipe or RECIPES[0]
    _check_choice("recipe", recipe, RECIPES)
    config, facts = base(), DATA_SETS[data]
    config.variant, config.recipe = variant, recipe
    with config.unlocked():
        config.net.update(fields | dict(variants[variant].net))
    config.net.num_classes = facts.num_classes
    config.data.update(name=data, flip=facts.flip)
    config.data.recipe.update(name=data, mean=facts.mean, std=facts.std)
    if data == IMAGENET:
        config.data.crop = "inception"
    return config


def apply_recipe(config: ConfigDict) -> ConfigDict:
    """Changes a family's faithful configuration in place to config.recipe; returns it.

    modern: one cycle that ends at a learning rate of zero, with a larger rate and more
    decay (docs/recipes.md).
    """
    if config.recipe == "modern":
        config.optimizer.update(
            schedule="one_cycle",
            min_learning_rate=0.0,
            nesterov=True,
            rate_in_velocity=False,
        )
        if config.data.crop == "pad":  # chosen on CIFAR-10; not tried on photographs
            config.optimizer.weight_decay = 5e-4
            config.optimizer.learning_rate *= 2
    return config


def _check_choice(kind: str, given: str, choices, others: str = "") -> None:
    if given in choices:
        return
    nearest = difflib.get_close_matches(given, choices, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise ValueError(
        f"unknown {kind} {given!r}: choose from {', '.join(choices)}{others}{hint}"
    )

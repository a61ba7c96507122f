"""Draws a sheet of augmented training images, as the net receives them.

python -m analysis.augmentations --config=configs/gunn.py:15,cifar10 --out=sheet.png \\
    [--config.data.dir=...] [--config.augment.cutout=8] [--images=8] [--versions=10]
python -m analysis.augmentations --config=configs/cfmz.py:20,cifar10 --gallery \\
    --versions=7 --out=gallery.png

The left column shows training images as in evaluation. Each further column is one step
of the configuration's input pipeline and augmentation, without normalisation. Captions
below mixed images give the shares of the rows in their targets. --gallery draws a sheet
for each entry of GALLERY, below the fields that it sets.
"""

import dataclasses
import functools
import pathlib
import sys
from typing import Any

from runtime import processes

if __name__ == "__main__":
    processes.set_environment()  # before jax is imported

import jax
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict, config_flags
from PIL import Image, ImageDraw

import augment
import input_pipeline
from augment.check import check
from runtime import command_line

CELL, GAP, CAPTION = 96, 4, 16  # pixels; images larger than a cell are not scaled
TITLE = 26  # pixels above each sheet of the gallery
# Fields over those of the configuration, and the number of images.
GALLERY: tuple[tuple[dict[str, Any], int], ...] = (
    ({"data.border": "zero"}, 1),
    ({"data.border": "mean"}, 1),
    ({"data.border": "white"}, 1),
    ({"data.border": "reflect"}, 1),
    ({"augment.jigsaw": True}, 1),
    ({"data.crop": "inception", "data.image_size": 32}, 1),
    ({"augment.jitter": 0.4, "augment.lighting": 0.1}, 1),
    ({"augment.hls": (36, 50, 50)}, 1),
    ({"augment.cutout": 16}, 1),
    ({"augment.mixup": 1.0}, 2),
    ({"augment.cutmix": 1.0, "augment.cutmix_probability": 1.0}, 2),
    ({"augment.ricap": 0.3}, 4),
    ({"augment.autoaugment": True}, 1),
    ({"augment.randaugment_ops": 2, "augment.randaugment_magnitude": 10.0}, 1),
)


def versions(config: ConfigDict, images: int, count: int) -> tuple[np.ndarray, ...]:
    """Augments `images` training images in each of `count` steps.

    Returns:
      plain: (images, H, W, 3) uint8, as in evaluation.
      augmented: (count, images, H, W, 3) uint8.
      shares: (count, images, images); shares[step, i, j] is the share of image j in the
        target of augmented[step, i].
    Raises ValueError for data that cannot be loaded and impossible augmentations.
    """
    config = config.copy_and_resolve_references()
    config.train.batch_size = config.eval.batch_size = images
    split = input_pipeline.load(config.data, "train")
    facts = input_pipeline.facts(config.data, split)
    split = _spread(split, images)
    check(config.augment, images)
    normalization = dict(mean=facts.mean, std=facts.std)
    options = dict(options=config.augment.to_dict(), normalization=normalization)
    options |= dict(num_classes=images, first_row=0)
    step = jax.jit(functools.partial(augment.augment, **options))
    (test,) = input_pipeline.batches(config, "test", examples=split)
    batches = input_pipeline.batches(config, "train", examples=split, mean=facts.mean)
    augmented, shares = [], []
    for number, batch in zip(range(count), batches, strict=False):
        order = np.argsort(batch["label"])
        key = jax.random.fold_in(jax.random.key(config.seed), number)
        x, targets = step(batch["image"], batch["label"], key=key)
        if targets.ndim == 1:
            targets = np.eye(images)[targets]
        augmented.append(augment.denormalize(x, **normalization)[order])
        shares.append(np.asarray(targets)[order])
    return test["image"], np.stack(augmented), np.stack(shares)


def _spread(split, count: int):
    """Takes `count` examples and makes each a class, so that targets identify them."""
    total = len(split)
    if not 0 < count <= total:
        raise ValueError(f"--images must lie between 1 and {total}, got {count}")
    chosen = np.arange(count) * total // count  # files may be sorted by class
    labels, names = np.arange(count, dtype=np.int32), tuple(map(str, range(count)))
    return dataclasses.replace(split.take(chosen), labels=labels, class_names=names)


def sheet(plain: np.ndarray, augmented: np.ndarray, shares: np.ndarray) -> Image.Image:
    """Draws the arrays that `versions` returns, one row per image."""
    count, images, height, width, _ = augmented.shape
    scale = max(1, CELL // max(height, width))
    cell = (width * scale, height * scale)
    mixed = (shares > 0).sum(axis=-1).max()  # most images in one target
    caption = CAPTION * -(-mixed // 2) if mixed > 1 else 0
    step_x, step_y = cell[0] + GAP, cell[1] + caption + GAP
    size = (CAPTION + 2 * GAP + step_x * (count + 1), GAP + step_y * images)
    result = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(result)
    for row in range(images):
        top = GAP + row * step_y
        draw.text((GAP, top), str(row), fill="black", font_size=CAPTION - 4)
        for column, pixels in enumerate([plain[row], *augmented[:, row]]):
            left = CAPTION + GAP + column * step_x + (GAP if column else 0)
            image = Image.fromarray(pixels).resize(cell, Image.NEAREST)
            result.paste(image, (left, top))
            if caption and column:
                text = _caption(shares[column - 1, row])
                position = (left, top + cell[1])
                draw.multiline_text(
                    position, text, "black", font_size=CAPTION - 4, spacing=2
                )
    return result


def gallery(config: ConfigDict, count: int) -> Image.Image:
    """Draws a sheet with `count` versions for each entry of GALLERY."""
    sheets = []
    for fields, images in GALLERY:
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict(fields)
        title = "   ".join(f"{name}={value}" for name, value in fields.items())
        sheets.append((title, sheet(*versions(changed, images, count))))
    width = max(image.width for _, image in sheets)
    height = sum(TITLE + image.height for _, image in sheets)
    result = Image.new("RGB", (width, height), "white")
    draw, top = ImageDraw.Draw(result), 0
    for title, image in sheets:
        draw.text((GAP, top + TITLE // 3), title, "black", font_size=CAPTION - 2)
        result.paste(image, (0, top + TITLE))
        top += TITLE + image.height
    return result


def _caption(shares: np.ndarray) -> str:
    """Returns '#0 70%, #1 30%', largest share first, two per line."""
    order = [i for i in np.argsort(-shares, kind="stable") if shares[i] > 0]
    parts = [f"#{i} {shares[i]:.0%}" for i in order]
    return "\n".join(", ".join(parts[i : i + 2]) for i in range(0, len(parts), 2))


def main(_):
    folder = pathlib.Path(flags.FLAGS.out).absolute().parent
    if not folder.is_dir():
        sys.exit(f"error: --out: directory {folder} does not exist")
    try:
        config, count = flags.FLAGS.config, flags.FLAGS.versions
        if flags.FLAGS.gallery:
            image = gallery(config, count)
        else:
            image = sheet(*versions(config, flags.FLAGS.images, count))
        image.save(flags.FLAGS.out)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{flags.FLAGS.out}: {image.width} x {image.height} pixels")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "configs/FAMILY.py[:VARIANT,DATA]")
    flags.DEFINE_string("out", None, "image to write, such as sheet.png")
    flags.DEFINE_integer("images", 8, "number of images", lower_bound=1)
    flags.DEFINE_bool("gallery", False, "draw a sheet for each augmentation")
    flags.DEFINE_integer("versions", 10, "number of training steps", lower_bound=1)
    flags.mark_flags_as_required(["config", "out"])
    app.run(main, flags_parser=command_line.parse)

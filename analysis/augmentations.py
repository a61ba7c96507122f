"""A picture of what the net really sees: test images, and versions of them in training.

python -m analysis.augmentations --config=configs/gunn.py:15,cifar10 --out=sheet.png \\
    [--config.data.dir=...] [--config.augment.cutout=8] [--images=8] [--versions=10]

Left column: training images as in a test. Then what the training step gives the net in
one step after the other, through the configuration's own pipeline, its normalisation
undone. Below a mixed image: the shares of images in its target, numbered by row.
"""

import dataclasses
import pathlib
import sys

from runtime import environment

if __name__ == "__main__":
    environment.settle()  # before jax is imported

import jax
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict, config_flags
from PIL import Image, ImageDraw

import augment
import input_pipeline
from augment.check import check
from runtime import preflight

CELL, GAP, CAPTION = 96, 4, 12  # pixels; a larger image is shown as large as it is


def versions(
    config: ConfigDict, images: int, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`images` of the training split, as in a test and in each of `count` steps.

    Returns plain (images, H, W, 3) and seen (count, images, H, W, 3), both uint8, and
    shares (count, images, images): of which images, in targets, seen[step, i] is made.
    Raises ValueError for what cannot be loaded or carried out.
    """
    config = config.copy_and_resolve_references()
    config.train.batch_size = config.eval.batch_size = images
    examples = input_pipeline.load(config.data, "train")
    facts = input_pipeline.facts(config.data, examples)
    examples = _spread(examples, images)
    check(config.augment, images)
    normalization = dict(mean=facts.mean, std=facts.std)

    @jax.jit
    def step(batch, key):
        return augment.augment(
            batch["image"],
            batch["label"],
            options=config.augment.to_dict(),
            normalization=normalization,
            num_classes=images,
            key=key,
            first_row=0,
        )

    def shown(x):
        x = x * np.asarray(normalization["std"]) + np.asarray(normalization["mean"])
        return np.rint(np.clip(x, 0, 255)).astype(np.uint8)

    (test,) = input_pipeline.batches(config, "test", examples=examples)
    plain = shown(augment.normalize(test["image"], **normalization))
    batches = input_pipeline.batches(
        config, "train", examples=examples, mean=facts.mean
    )
    seen, shares = [], []
    for number, batch in zip(range(count), batches, strict=False):
        order = np.argsort(batch["label"])
        x, targets = step(
            batch, jax.random.fold_in(jax.random.key(config.seed), number)
        )
        if targets.ndim == 1:
            targets = np.eye(images)[targets]
        seen.append(shown(np.asarray(x))[order])
        shares.append(np.asarray(targets)[order])
    return plain, np.stack(seen), np.stack(shares)


def _spread(examples, count: int):
    """`count` of the examples, each of a class of its own, which tells them apart."""
    total = len(examples.labels)
    if not 0 < count <= total:
        raise ValueError(f"--images={count}: there are {total}")
    chosen = np.arange(count) * total // count  # files may be sorted by class
    names = tuple(map(str, range(count)))
    return dataclasses.replace(
        examples.take(chosen),
        labels=np.arange(count, dtype=np.int32),
        class_names=names,
    )


def sheet(plain: np.ndarray, seen: np.ndarray, shares: np.ndarray) -> Image.Image:
    """One row an image: as in a test, then its versions; arguments of `versions`."""
    count, images, height, width, _ = seen.shape
    scale = max(1, CELL // max(height, width))
    cell = (width * scale, height * scale)
    mixed = (shares > 0).sum(axis=-1).max()  # images in one, at most
    caption = CAPTION * -(-mixed // 2) if mixed > 1 else 0
    step_x, step_y = cell[0] + GAP, cell[1] + caption + GAP
    size = (CAPTION + 2 * GAP + step_x * (count + 1), GAP + step_y * images)
    result = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(result)
    for row in range(images):
        top = GAP + row * step_y
        draw.text((GAP, top), str(row), fill="black")
        for column, pixels in enumerate([plain[row], *seen[:, row]]):
            left = CAPTION + GAP + column * step_x + (GAP if column else 0)
            picture = Image.fromarray(pixels).resize(cell, Image.NEAREST)
            result.paste(picture, (left, top))
            if caption and column:
                text = _caption(shares[column - 1, row])
                place = (left, top + cell[1])
                draw.multiline_text(place, text, "black", font_size=9, spacing=2)
    return result


def _caption(shares: np.ndarray) -> str:
    """'#0 70%, #1 30%', the largest share first, two in a line."""
    order = [i for i in np.argsort(-shares, kind="stable") if shares[i] > 0]
    parts = [f"#{i} {shares[i]:.0%}" for i in order]
    return "\n".join(", ".join(parts[i : i + 2]) for i in range(0, len(parts), 2))


def main(_):
    folder = pathlib.Path(flags.FLAGS.out).absolute().parent
    if not folder.is_dir():
        sys.exit(f"error: --out: no folder {folder}")
    try:
        found = versions(flags.FLAGS.config, flags.FLAGS.images, flags.FLAGS.versions)
        picture = sheet(*found)
        picture.save(flags.FLAGS.out)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{flags.FLAGS.out}: {picture.width} x {picture.height} pixels")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "configs/FAMILY.py[:VARIANT,DATA]")
    flags.DEFINE_string("out", None, "where the sheet goes, a PNG")
    flags.DEFINE_integer("images", 8, "rows of the sheet", lower_bound=1)
    flags.DEFINE_integer("versions", 10, "of each in training", lower_bound=1)
    flags.mark_flags_as_required(["config", "out"])
    app.run(main, flags_parser=preflight.parsed)

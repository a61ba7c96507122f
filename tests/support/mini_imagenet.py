"""A small generated ImageNet: images of many sizes and kinds, in each format."""

import io
import pathlib

import numpy as np
from PIL import Image

from configs import common
from tests.support.tfds_writer import write_set

CLASSES = ("n01", "n02", "n03", "n04")
COUNTS = {"train": 200, "test": 41}  # 41 is prime


def wave(rng, label):
    """Returns a wave of random size; its direction is the class."""
    height, width = rng.integers(24, 97, 2)
    y, x = np.mgrid[:height, :width] / 12
    angle = label * np.pi / 4 + rng.normal(0, 0.1)
    heights = np.sin(y * np.sin(angle) + x * np.cos(angle) + rng.uniform(0, 6))
    color = rng.uniform(40, 120, 3)
    pixels = 128 + heights[..., None] * color + rng.normal(0, 8, (height, width, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def encode(image, kind="jpeg"):
    """Encodes an image in one of the formats that occur in ImageNet."""
    buffer = io.BytesIO()
    if kind == "png":
        image.convert("RGBA").save(buffer, "png")
    elif kind == "progressive":
        image.save(buffer, "jpeg", progressive=True, quality=90)
    elif kind in ("grey", "cmyk"):
        image.convert({"grey": "L", "cmyk": "CMYK"}[kind]).save(buffer, "jpeg")
    else:
        image.save(buffer, "jpeg", quality=90)
    return buffer.getvalue()


KINDS = ("jpeg", "png", "progressive", "grey", "cmyk")


def encoded_images():
    """Returns split -> [(encoded, label)], sorted by class as folders are."""
    made = {}
    for seed, (split, count) in enumerate(COUNTS.items()):
        rng, labels = np.random.default_rng(seed), np.sort(np.arange(count) % 4)
        kinds = [KINDS[i // 10 % 5] if i % 10 == 0 else "jpeg" for i in range(count)]
        made[split] = [
            (encode(wave(rng, label), kind), int(label))
            for label, kind in zip(labels, kinds, strict=True)
        ]
    return made


def write_folders(root, name="mini"):
    """Writes class folders to root/name; the test split is 'val', as in ImageNet."""
    for split, files in encoded_images().items():
        for i, (content, label) in enumerate(files):
            folder = pathlib.Path(root, name, {"test": "val"}.get(split, split))
            folder = folder / CLASSES[label]
            folder.mkdir(parents=True, exist_ok=True)
            suffix = "png" if content[1:4] == b"PNG" else "JPEG"
            (folder / f"{i:04}.{suffix}").write_bytes(content)
    return pathlib.Path(root, name)


def write_tfds(root, file_format, **options):
    return write_set(
        root,
        file_format,
        declared=(None, None, 3),
        **{"classes": 4, "shards": 3, "encoded": encoded_images()} | options,
    )


def make_config(root, **data):
    """Returns a configuration of the set 'tiny' in root."""
    config = common.base()
    config.train.batch_size, config.eval.batch_size, config.net.num_classes = 8, 16, 4
    config.data.update(name="tiny", dir=str(root), cache_dir=str(root / "cache"))
    config.data.update({"crop": "inception", "image_size": 32} | data)
    return config

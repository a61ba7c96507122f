"""Decodes images: encoded bytes -> (H, W, 3) uint8.

As a viewer shows them: turned upright as their EXIF data says, and over BACKGROUND if
they are transparent. as_stored=True does neither, like the originals.
"""

import os
from typing import IO

import numpy as np
from PIL import ExifTags, Image

from data_sources.errors import DataError
from data_sources.tf import tensorflow

BACKGROUND = (255, 255, 255)  # of transparent images


def open_image(file: IO[bytes] | str | os.PathLike) -> Image.Image:
    """Opens an image with Pillow, which reads the header only."""
    try:
        return Image.open(file)
    except Image.DecompressionBombError as error:
        raise DataError(
            f"has more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels, Pillow's limit "
            "against decompression bombs: make it smaller"
        ) from error


def shown_size(image: Image.Image, as_stored: bool = False) -> tuple[int, int]:
    """Returns the width and height of the decoded image."""
    sideways = not as_stored and _orientation(image) > 4
    return image.size[::-1] if sideways else image.size


def decode(
    content: bytes,
    image: Image.Image,
    window: tuple[int, int, int, int] | None = None,
    as_stored: bool = False,
) -> np.ndarray:
    """Decodes an image, or a window (top, left, h, w) of it, to (h, w, 3) uint8.

    image: the same image, opened by Pillow. Of upright grey and RGB JPEGs only the
    window is decoded; all other images are decoded whole. Raises DataError as rgb does,
    and ValueError for a truncated JPEG, for any window.
    """
    # Pillow has read up to the first scan. An end marker before it belongs to a
    # thumbnail; within a scan these two bytes mean nothing else, and any bytes may
    # follow the true end marker.
    if image.format == "JPEG" and content.rfind(b"\xff\xd9", image.fp.tell()) < 0:
        raise ValueError("truncated: the JPEG has no end marker")
    if image.format == "JPEG" and image.mode in ("L", "RGB"):
        tf, orientation = tensorflow(), 1 if as_stored else _orientation(image)
        # TensorFlow's default is a fast DCT, which is not exact.
        options = dict(channels=3, dct_method="INTEGER_ACCURATE")
        if window is not None and orientation == 1:
            top, left, height, width = window
            # Two more columns on each side: colours are stored at half resolution and
            # are interpolated from their neighbours.
            start, end = max(left - 2, 0), min(left + width + 2, image.width)
            wider = top, start, height, end - start
            pixels = tf.io.decode_and_crop_jpeg(content, wider, **options).numpy()
            return pixels[:, left - start : left - start + width]
        pixels = _upright(tf.io.decode_jpeg(content, **options).numpy(), orientation)
    else:
        pixels = rgb(image, as_stored)
    if window is None:
        return pixels
    top, left, height, width = window
    return pixels[top : top + height, left : left + width]


def rgb(image: Image.Image, as_stored: bool = False) -> np.ndarray:
    """Returns (H, W, 3) uint8; of 16 bits a channel, the high byte.

    Raises DataError for other channels of more than 8 bits.
    """
    orientation = 1 if as_stored else _orientation(image)
    # Pillow opens 16 bits of some formats in 32.
    sixteen = image.mode == "I" and image.format in ("PNG", "PPM")
    if sixteen or image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):  # Pillow would clip them
        raise DataError(
            f"has 32 bits a channel (mode {image.mode!r}), of unknown range: convert "
            "it to 8 bits"
        )
    if image.has_transparency_data and not as_stored:
        background = Image.new("RGBA", image.size, BACKGROUND)
        image = Image.alpha_composite(background, image.convert("RGBA"))
    return _upright(np.asarray(image.convert("RGB")), orientation)


def _orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation, 1 to 8; 1, upright, if there is none."""
    if image.format != "JPEG":
        image.load()  # PNG may store it after the pixels
    try:
        value = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged EXIF data; the image may be intact
        return 1
    return value if value in range(1, 9) else 1


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turns stored pixels (H, W, 3) upright."""
    if orientation > 4:
        pixels = pixels.swapaxes(0, 1)
    mirrored = orientation % 4 in (2, 3)  # 2, 3, 6 and 7
    upside_down = orientation % 4 in (3, 0)  # 3, 4, 7 and 8
    return pixels[:: -1 if upside_down else 1, :: -1 if mirrored else 1]

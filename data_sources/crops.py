"""Crops of one size from encoded images of any size, as the originals make them.

inception       fb.resnet.torch's RandomSizedCrop, bicubic (also DelugeNets, GUNN)
random_resized  torchvision's RandomResizedCrop of 2018, bilinear with antialiasing
                (X-Nets): the same windows, except if none fits
scale_aspect    IGCNets: random scale and aspect on a canvas, then a random window

The originals crop to 224; other crop sizes scale all their lengths in proportion. The
test crop is the centre of the image resized to a shorter side of 256/224 of its size.
Nothing here is random: the uniform numbers are arguments, so a crop is a function of
them and of the image. Results are rounded and clipped to uint8; the bicubic crops of
the originals are not rounded.
"""

import io
import itertools
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from data_sources.decoding import decode, open_image, shown_size
from data_sources.tf import tensorflow

CROPS = ("inception", "random_resized", "scale_aspect")
TRIES = 10
DRAWS = 5 * TRIES  # uniform numbers for the crop of one training image
AREA, ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)
# IGCNets: shorter side of its stored images, scale, aspect, colour of the canvas.
STORED, SCALE, IGC_ASPECT, CANVAS = 480, (0.533, 1.0), (0.75, 1.25), (123, 113, 99)


def random_crop(
    content: bytes, crop: str, size: int, draws: np.ndarray, as_stored: bool = False
) -> np.ndarray:
    """Returns a random crop (size, size, 3) uint8 of an encoded image.

    crop: one of CROPS; draws: (DRAWS,) uniform in 0..1, which choose the crop. Raises
    DataError for images of an unsupported kind, and any error of the decoders if the
    image is damaged.
    """
    image = open_image(io.BytesIO(content))
    if crop == "scale_aspect":
        scale, aspect = _between(SCALE, draws[0]), _between(IGC_ASPECT, draws[1])
        pixels = decode(content, image, as_stored=as_stored)
        return _on_canvas(pixels, size, scale, aspect, draws[2:4])
    shape = shown_size(image, as_stored)
    if crop == "inception" and not _window_that_fits(*shape, draws):
        # fb.resnet.torch's Scale(size) and CenterCrop(size).
        pixels = decode(content, image, as_stored=as_stored)
        return _test_crop(pixels, crop, size, side=size)
    pixels = decode(content, image, random_window(*shape, draws), as_stored)
    if crop == "random_resized":
        return np.asarray(Image.fromarray(pixels).resize((size, size), Image.BILINEAR))
    return bicubic(pixels, (size, size), (0, 0), size)


def center_crop(
    content: bytes, crop: str, size: int, as_stored: bool = False
) -> np.ndarray:
    """Returns the centre (size, size, 3) uint8 of an encoded image, for evaluation.

    Before, the shorter side is resized to 8/7 of size. Raises as random_crop does.
    """
    pixels = decode(content, open_image(io.BytesIO(content)), as_stored=as_stored)
    return _test_crop(pixels, crop, size)


def ten_crops(
    content: bytes, crop: str, size: int, as_stored: bool = False
) -> np.ndarray:
    """Returns the crops (10, size, size, 3) uint8 of fb.resnet.torch's TenCrop.

    The centre, the upper left, upper right, lower left and lower right corners, and the
    same of the mirrored image, which is resized as for center_crop.
    """
    pixels = decode(content, open_image(io.BytesIO(content)), as_stored=as_stored)
    places = [None, *itertools.product((0, 1), repeat=2)]
    pairs = itertools.product((pixels, pixels[:, ::-1]), places)
    return np.stack([_test_crop(image, crop, size, place) for image, place in pairs])


def _test_crop(
    pixels: np.ndarray,
    crop: str,
    size: int,
    place: tuple[int, int] | None = None,
    side: int | None = None,
) -> np.ndarray:
    """Returns a crop for evaluation.

    place: of a corner, 0 or 1 down and to the right; None: the centre. side: to which
    the shorter side is resized first; None: in proportion to 256.
    """
    if crop == "scale_aspect":
        return _on_canvas(pixels, size, SCALE[0], 1.0, place)
    height, width = resized = _shorter_side(pixels, side or _in_proportion(256, size))
    room = np.subtract(resized, size)
    rounded = np.ceil if crop == "inception" else np.rint  # Torch7, torchvision
    offset = rounded(room / 2) if place is None else np.multiply(place, room)
    top, left = offset.astype(int)
    if crop == "inception":
        return bicubic(pixels, resized, (top, left), size)
    image = Image.fromarray(pixels).resize((width, height), Image.BILINEAR)
    return np.asarray(image)[top : top + size, left : left + size]


def random_window(
    width: int, height: int, draws: np.ndarray
) -> tuple[int, int, int, int]:
    """Returns top, left, height, width of the Inception crop; draws: (DRAWS,).

    Up to ten tries: share of the area uniform in AREA, ratio of width to height uniform
    in ASPECT (not its logarithm), the sides swapped with probability 1/2, any position.
    If none fits, the central square, as in torchvision.
    """
    side = min(width, height)
    square = (height - side) // 2, (width - side) // 2, side, side
    return _window_that_fits(width, height, draws) or square


def _window_that_fits(
    width: int, height: int, draws: np.ndarray
) -> tuple[int, int, int, int] | None:
    for area, aspect, swap, y, x in draws.reshape(TRIES, 5):
        area = _between(AREA, area) * width * height
        ratio = _between(ASPECT, aspect)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if swap < 0.5:
            w, h = h, w
        if 0 < w <= width and 0 < h <= height:
            return int(y * (height - h + 1)), int(x * (width - w + 1)), h, w
    return None


def bicubic(
    pixels: np.ndarray, resized: tuple[int, int], offset: tuple[int, int], size: int
) -> np.ndarray:
    """Resizes as Torch7's image.scale(..., 'bicubic'); returns a window of the result.

    pixels: (h, w, 3) uint8; resized: height and width to resize to; the window has size
    rows and columns and starts at offset. Catmull-Rom kernel, corners aligned, no
    antialiasing; beyond the edge the last two pixels are continued linearly. An image
    that already has the size is not changed.
    """
    if pixels.shape[:2] == tuple(resized):
        (y, x), rows = offset, slice(0, size)
        return pixels[y:, x:][rows, rows]
    height, width = pixels.shape[:2]
    # One more pixel on each side, so that the edge needs no special case.
    padded = np.zeros((height + 2, width + 2, 3), np.float32)
    padded[1:-1, 1:-1] = pixels
    for rows in (padded, padded.swapaxes(0, 1)):
        k = min(2, len(rows) - 2)  # a single row continues itself
        rows[0], rows[-1] = 2 * rows[1] - rows[k], 2 * rows[-2] - rows[-1 - k]
    steps = np.maximum(np.array((height, width)) - 1, 1e-3) / (np.array(resized) - 1)
    return _sampled(padded, steps * offset + 1, steps, size, "keyscubic")


def _sampled(
    pixels: np.ndarray, start: np.ndarray, step: np.ndarray, size: int, kernel: str
) -> np.ndarray:
    """Interpolates pixels at start + i step: (size, size, 3) uint8.

    start, step: (2,), for rows and columns; the centre of the first pixel is 0.
    """
    # The operation samples at (i + 1/2 - translation) / scale - 1/2.
    sampled = tensorflow().raw_ops.ScaleAndTranslate(
        images=pixels[None],
        size=(size, size),
        scale=(1 / step).astype(np.float32),
        translation=(0.5 - (start + 0.5) / step).astype(np.float32),
        kernel_type=kernel,
        antialias=False,
    )
    return np.clip(np.rint(sampled[0].numpy()), 0, 255).astype(np.uint8)


def _on_canvas(
    pixels: np.ndarray,
    size: int,
    scale: float,
    aspect: float,
    place: Sequence[float] | None,
) -> np.ndarray:
    """Puts an image on IGCNets' canvas and returns a window of the canvas.

    pixels: first resized to the shorter side of the original's files. place: position
    of the window, 0..1 down and to the right; None: centred.
    """
    height, width = _shorter_side(pixels, _in_proportion(STORED, size))
    if (height, width) != pixels.shape[:2]:
        image = Image.fromarray(pixels).resize((width, height), Image.BILINEAR)
        pixels = np.asarray(image)
    horizontal = 2 * scale / (1 + aspect)
    factors = np.array((aspect * horizontal, horizontal))
    least = _in_proportion(256, size)
    canvas = np.maximum(least, scale * np.array((height, width)))
    room = canvas.astype(int) - size
    offset = room // 2
    if place is not None:
        offset = np.minimum(np.multiply(place, room + 1), room).astype(int)
    # A rim in the colour of the canvas, because OpenCV's bilinear blends into it.
    rimmed = np.empty((height + 2, width + 2, 3), np.uint8)
    rimmed[:] = CANVAS
    rimmed[1:-1, 1:-1] = pixels
    border = (canvas - factors * (height, width)) / 2
    start = (offset - border) / factors
    window = _sampled(rimmed, start + 1, 1 / factors, size, "triangle")
    rows, columns = start[:, None] + np.arange(size) / factors[:, None]
    window[(rows < -1) | (rows > height)] = CANVAS
    window[:, (columns < -1) | (columns > width)] = CANVAS
    return window


def _shorter_side(pixels: np.ndarray, side: int) -> tuple[int, int]:
    """Returns the height and width with this shorter side, the other rounded down."""
    height, width = pixels.shape[:2]
    shorter = min(height, width)
    return side * height // shorter, side * width // shorter


def _in_proportion(of_224: int, size: int) -> int:
    return round(size * of_224 / 224)


def _between(limits: tuple[float, float], share: float) -> float:
    return limits[0] + share * (limits[1] - limits[0])

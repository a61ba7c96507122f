"""Encoded photographs of any size -> crops of one size, as the originals make them.

inception       fb.resnet.torch's RandomSizedCrop and bicubic (also DelugeNets, GUNN)
random_resized  torchvision's RandomResizedCrop of 2018, bilinear with antialiasing
                (X-Nets): the same windows, but where none fits
scale_aspect    IGCNets: random scale and aspect on a canvas, then a random window

Sizes follow from that of the crop as the originals' do from 224: tests see the middle
of an image whose shorter side is 256/224 of it. Nothing here draws: the uniform numbers
come in, so that a crop is a function of them and of the image. Results are rounded to
uint8, which the originals' bicubic is not; what it overshoots is clipped.
"""

import io
import math
from types import ModuleType

import numpy as np
from PIL import Image

CROPS = ("inception", "random_resized", "scale_aspect")
TRIES = 10
DRAWS = 5 * TRIES  # uniform numbers in 0..1 for the crop of one training image
AREA, ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)
# IGCNets: files of shorter side 480, scale, aspect, colour of the canvas.
STORED, SCALE, IGC_ASPECT, CANVAS = 480, (0.533, 1.0), (0.75, 1.25), (123, 113, 99)


def train(
    tf: ModuleType, content: bytes, crop: str, size: int, draws: np.ndarray
) -> np.ndarray:
    """A random crop (size, size, 3) uint8 of an encoded image.

    tf: the module; crop: one of CROPS; draws: (DRAWS,) in 0..1. Raises anything if the
    image cannot be decoded: the decoders do.
    """
    picture = Image.open(io.BytesIO(content))  # reads the header only
    if crop == "scale_aspect":
        scale, aspect = _between(SCALE, draws[0]), _between(IGC_ASPECT, draws[1])
        pixels = decode(tf, content, picture)
        return _on_canvas(tf, pixels, size, scale, aspect, draws[2:4])
    window = _window_that_fits(*picture.size, draws)
    if window is None and crop == "inception":
        return _middle(tf, decode(tf, content, picture), size, size)
    pixels = decode(tf, content, picture, window or _square(*picture.size))
    if crop == "random_resized":
        return np.asarray(Image.fromarray(pixels).resize((size, size), Image.BILINEAR))
    return bicubic(tf, pixels, (size, size), (0, 0), size)


def test(tf: ModuleType, content: bytes, crop: str, size: int) -> np.ndarray:
    """The middle (size, size, 3) uint8 of an encoded image, shorter side made 8/7 size.

    As train, without draws.
    """
    picture = Image.open(io.BytesIO(content))
    pixels = decode(tf, content, picture)
    if crop == "scale_aspect":
        return _on_canvas(tf, pixels, size, SCALE[0], 1.0, None)
    side = _in_proportion(256, size)
    if crop == "inception":
        return _middle(tf, pixels, side, size)
    height, width = resized = _shorter_side(pixels, side)
    picture = Image.fromarray(pixels).resize((width, height), Image.BILINEAR)
    top, left = (round((x - size) / 2) for x in resized)
    return np.asarray(picture)[top : top + size, left : left + size]


def random_window(
    width: int, height: int, draws: np.ndarray
) -> tuple[int, int, int, int]:
    """top, left, height, width of the Inception crop of an image; draws: (DRAWS,).

    Up to ten tries: share of the area uniform in AREA, width to height uniform in
    ASPECT, not its logarithm, the sides swapped every other time, any position. If none
    fits, the square in the middle: torchvision's choice, for random_resized.
    """
    return _window_that_fits(width, height, draws) or _square(width, height)


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


def _square(width: int, height: int) -> tuple[int, int, int, int]:
    side = min(width, height)
    return (height - side) // 2, (width - side) // 2, side, side


def _middle(tf: ModuleType, pixels: np.ndarray, side: int, size: int) -> np.ndarray:
    """fb.resnet.torch's Scale(side) and CenterCrop(size), also where no window fits."""
    resized = _shorter_side(pixels, side)
    offset = tuple(math.ceil((x - size) / 2) for x in resized)
    return bicubic(tf, pixels, resized, offset, size)


def decode(
    tf: ModuleType,
    content: bytes,
    picture: Image.Image,
    window: tuple[int, int, int, int] | None = None,
) -> np.ndarray:
    """(h, w, 3) uint8 of an image, or of a window (top, left, h, w) of it.

    picture: the same image, opened. Grey and colour JPEGs are decoded in one pass with
    the crop; PNG, JPEG in CMYK and what else Pillow knows, whole. Transparency is
    ignored. Raises ValueError for pixels of more than 8 bits, and for a JPEG that is
    cut off, whatever the window.
    """
    # Up to its first scan, Pillow has read. An end marker before that is a thumbnail's,
    # and in a scan these bytes are nothing else; behind the true one may lie anything.
    if picture.format == "JPEG" and content.rfind(b"\xff\xd9", picture.fp.tell()) < 0:
        raise ValueError("it is cut off: a JPEG without its end marker")
    if picture.format == "JPEG" and picture.mode in ("L", "RGB"):
        # The default of TensorFlow is a fast DCT, which is not exact.
        options = dict(channels=3, dct_method="INTEGER_ACCURATE")
        if window is None:
            return tf.io.decode_jpeg(content, **options).numpy()
        top, left, height, width = window
        # Two columns more: at the sides of a window the colours, which are stored at
        # half resolution, would be interpolated without their neighbours.
        start, end = max(left - 2, 0), min(left + width + 2, picture.width)
        wider = top, start, height, end - start
        pixels = tf.io.decode_and_crop_jpeg(content, wider, **options).numpy()
        return pixels[:, left - start : left - start + width]
    pixels = rgb(picture)
    if window is None:
        return pixels
    top, left, height, width = window
    return pixels[top : top + height, left : left + width]


def rgb(picture: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8; ValueError for more than 8 bits, which Pillow would clip."""
    if picture.mode[0] in "IF":
        raise ValueError(f"pixels are of mode {picture.mode!r}, not of 8 bits")
    return np.asarray(picture.convert("RGB"))


def bicubic(
    tf: ModuleType,
    pixels: np.ndarray,
    resized: tuple[int, int],
    offset: tuple[int, int],
    size: int,
) -> np.ndarray:
    """Torch7's image.scale(..., 'bicubic') and a window of its result.

    pixels (h, w, 3) uint8 to the height and width of resized; of that, size rows and
    columns from offset on. Catmull-Rom, corners on corners, no antialiasing when it
    shrinks; pixels beyond the edge continue the last two in a straight line. An image
    that has its size already is not changed.
    """
    if pixels.shape[:2] == tuple(resized):
        (y, x), rows = offset, slice(0, size)
        return pixels[y:, x:][rows, rows]
    height, width = pixels.shape[:2]
    # A pixel more on each side, so that the edge is as any other place.
    padded = np.zeros((height + 2, width + 2, 3), np.float32)
    padded[1:-1, 1:-1] = pixels
    second = min(2, height), min(2, width)  # one row alone is continued by itself
    padded[0], padded[-1] = (
        2 * padded[1] - padded[second[0]],
        2 * padded[-2] - padded[-1 - second[0]],
    )
    padded[:, 0], padded[:, -1] = (
        2 * padded[:, 1] - padded[:, second[1]],
        2 * padded[:, -2] - padded[:, -1 - second[1]],
    )
    steps = np.maximum(np.array((height, width)) - 1, 1e-3) / (np.array(resized) - 1)
    return _sampled(tf, padded, steps * offset + 1, steps, size, "keyscubic")


def _sampled(
    tf: ModuleType,
    pixels: np.ndarray,
    start: np.ndarray,
    step: np.ndarray,
    size: int,
    kernel: str,
) -> np.ndarray:
    """(size, size, 3) uint8: pixels at start + i step, interpolated by the kernel.

    start, step: (2,), for rows and columns; the middle of the first pixel is 0.
    """
    # The operation's place i is (i + 1/2 - translation) / scale - 1/2.
    sampled = tf.raw_ops.ScaleAndTranslate(
        images=pixels[None],
        size=(size, size),
        scale=(1 / step).astype(np.float32),
        translation=(0.5 - (start + 0.5) / step).astype(np.float32),
        kernel_type=kernel,
        antialias=False,
    )
    return np.clip(np.rint(sampled[0].numpy()), 0, 255).astype(np.uint8)


def _on_canvas(
    tf: ModuleType,
    pixels: np.ndarray,
    size: int,
    scale: float,
    aspect: float,
    place: np.ndarray | None,
) -> np.ndarray:
    """IGCNets' image on its canvas and a window of it.

    pixels: first brought to the shorter side that the original's files have. place:
    (2,), where the window lies, 0..1 down and to the right; None: in the middle.
    """
    height, width = _shorter_side(pixels, _in_proportion(STORED, size))
    if (height, width) != pixels.shape[:2]:
        picture = Image.fromarray(pixels).resize((width, height), Image.BILINEAR)
        pixels = np.asarray(picture)
    horizontal = 2 * scale / (1 + aspect)
    factors = np.array((aspect * horizontal, horizontal))
    least = _in_proportion(256, size)
    canvas = np.maximum(least, scale * np.array((height, width)))
    room = canvas.astype(int) - size
    offset = room // 2 if place is None else (place * (room + 1)).astype(int)
    # A rim in the colour of the canvas, into which OpenCV's bilinear blends.
    rimmed = np.empty((height + 2, width + 2, 3), np.uint8)
    rimmed[:] = CANVAS
    rimmed[1:-1, 1:-1] = pixels
    border = (canvas - factors * (height, width)) / 2
    start = (offset - border) / factors
    window = _sampled(tf, rimmed, start + 1, 1 / factors, size, "triangle")
    rows, columns = start[:, None] + np.arange(size) / factors[:, None]
    window[(rows < -1) | (rows > height)] = CANVAS
    window[:, (columns < -1) | (columns > width)] = CANVAS
    return window


def _shorter_side(pixels: np.ndarray, side: int) -> tuple[int, int]:
    """Height and width with this shorter side; the fraction of the other is dropped."""
    height, width = pixels.shape[:2]
    shorter = min(height, width)
    return side * height // shorter, side * width // shorter


def _in_proportion(of_224: int, size: int) -> int:
    return round(size * of_224 / 224)


def _between(limits: tuple[float, float], share: float) -> float:
    return limits[0] + share * (limits[1] - limits[0])

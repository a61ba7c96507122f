"""Crops equal those of the originals, restated in plain NumPy and Pillow."""

import io
import itertools
import math

import numpy as np
import pytest
from PIL import Image

from data_sources import crops, decoding
from tests.support.mini_imagenet import KINDS, encode, wave


def whole(content):
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def draws_for(count):
    return np.random.default_rng(0).random((count, crops.DRAWS))


@pytest.fixture(scope="session")
def generated():
    rng = np.random.default_rng(3)
    return [encode(wave(rng, i % 4), KINDS[i % 5]) for i in range(10)]


@pytest.fixture(
    scope="session",
    params=["generated", "some", pytest.param("all", marks=pytest.mark.slow)],
)
def photographs(request, generated):
    """Returns encoded images: generated, a few photographs, or all 99 photographs."""
    if request.param == "generated":
        return generated
    folder = request.getfixturevalue("shared") / "data" / "imagenet_sample"
    files = sorted(folder.glob("*/*.JPEG"))
    if not files:
        pytest.skip(f"{folder} is not here")
    return [x.read_bytes() for x in files[:: 1 if request.param == "all" else 14]]


def torch_bicubic(pixels, resized):
    """Computes Torch7's image.scale: aligned corners, Catmull-Rom, linear borders."""
    for axis, length in enumerate(resized):
        pixels = np.moveaxis(pixels.astype(np.float64), axis, 0)
        old = len(pixels)
        if old == length:
            pixels = np.moveaxis(pixels, 0, axis)
            continue
        extended = np.concatenate(
            [2 * pixels[:1] - pixels[1:2], pixels, 2 * pixels[-1:] - pixels[-2:-1]]
        )
        extended = np.concatenate([extended, extended[-1:]])  # has weight 0
        position = np.arange(length) * (old - 1) / (length - 1)
        k = np.floor(position + 1e-12).astype(int)
        t = (position - k).reshape(-1, 1, 1)
        p0, p1, p2, p3 = (extended[k + i] for i in range(4))
        pixels = p1 + t / 2 * (
            p2
            - p0
            + t * (2 * p0 - 5 * p1 + 4 * p2 - p3 + t * (3 * (p1 - p2) + p3 - p0))
        )
        pixels = np.moveaxis(pixels, 0, axis)
    return np.clip(np.rint(pixels), 0, 255)


def torch_middle(pixels, side, size):
    """Resizes the shorter side to `side`, rounds the other down, crops the centre."""
    shorter = min(pixels.shape[:2])
    resized = [
        side if x == shorter else int(x * (side / shorter) + 1e-9)
        for x in pixels.shape[:2]
    ]
    y, x = (math.ceil((r - size) / 2) for r in resized)
    return torch_bicubic(pixels, resized)[y : y + size, x : x + size]


def assert_near(ours, expected, levels=1, share=0.01):
    """Asserts equality up to a few roundings by at most `levels`."""
    assert ours.dtype == np.uint8
    difference = np.abs(ours.astype(int) - expected)
    assert difference.max() <= levels
    assert (difference > 0).mean() < share


def test_a_decoded_window_equals_that_of_the_whole_image(photographs):
    for content, draws in zip(photographs, draws_for(len(photographs)), strict=True):
        opened = Image.open(io.BytesIO(content))
        window = crops.random_window(*opened.size, draws)
        top, left, height, width = window
        ours = decoding.decode(content, opened, window)
        expected = whole(content)[top : top + height, left : left + width]
        np.testing.assert_array_equal(ours, expected)
        np.testing.assert_array_equal(
            decoding.decode(content, Image.open(io.BytesIO(content))), whole(content)
        )


@pytest.mark.parametrize("size", [224, 32])
def test_inception_equals_torchs_bicubic(photographs, size):
    for content, draws in zip(photographs, draws_for(len(photographs)), strict=True):
        pixels = whole(content)
        top, left, height, width = crops.random_window(*pixels.shape[1::-1], draws)
        window = pixels[top : top + height, left : left + width]
        expected = torch_bicubic(window, (size, size))
        if height == width == min(pixels.shape[:2]):  # no window fits
            expected = torch_middle(pixels, size, size)
        assert_near(crops.random_crop(content, "inception", size, draws), expected)

        expected = torch_middle(pixels, round(size * 256 / 224), size)
        assert_near(crops.center_crop(content, "inception", size), expected)


def test_random_resized_equals_pillows_resize(photographs):
    for content, draws in zip(photographs, draws_for(len(photographs)), strict=True):
        image = Image.open(io.BytesIO(content)).convert("RGB")
        top, left, height, width = crops.random_window(*image.size, draws)
        window = image.crop((left, top, left + width, top + height))
        expected = np.asarray(window.resize((224, 224), Image.BILINEAR))
        ours = crops.random_crop(content, "random_resized", 224, draws)
        np.testing.assert_array_equal(ours, expected)

        w, h = (int(256 * x / min(image.size)) for x in image.size)
        x, y = round((w - 224) / 2), round((h - 224) / 2)
        resized = np.asarray(image.resize((w, h), Image.BILINEAR))
        ours = crops.center_crop(content, "random_resized", 224)
        np.testing.assert_array_equal(ours, resized[y : y + 224, x : x + 224])


def warp_affine(pixels, matrix, height, width):
    """Computes OpenCV's warpAffine: bilinear, with the canvas colour outside."""
    border = np.array((123, 113, 99), np.float64)
    padded = np.full((pixels.shape[0] + 4, pixels.shape[1] + 4, 3), border)
    padded[2:-2, 2:-2] = pixels
    (ys, y0), (xs, x0) = matrix
    y, x = (np.arange(height) - y0) / ys, (np.arange(width) - x0) / xs
    y = np.clip(y, -2, pixels.shape[0])[:, None, None]
    x = np.clip(x, -2, pixels.shape[1])[None, :, None]
    i, j = np.floor(y).astype(int), np.floor(x).astype(int)
    v, u = y - i, x - j
    i, j = i[..., 0] + 2, j[..., 0] + 2
    return (
        (1 - v) * (1 - u) * padded[i, j]
        + (1 - v) * u * padded[i, j + 1]
        + v * (1 - u) * padded[i + 1, j]
        + v * u * padded[i + 1, j + 1]
    )


def test_scale_aspect_equals_igcnets_canvas(photographs):
    for content, draws in zip(photographs, draws_for(len(photographs)), strict=True):
        image = Image.open(io.BytesIO(content)).convert("RGB")
        w, h = (480 * x // min(image.size) for x in image.size)
        if (w, h) != image.size:
            image = image.resize((w, h), Image.BILINEAR)
        for training in (True, False):
            t = 0.533 + 0.467 * draws[0] if training else 0.533
            a = 0.75 + 0.5 * draws[1] if training else 1.0
            horizontal = 2 * t / (1 + a)
            vertical = a * horizontal
            canvas_w, canvas_h = max(256, t * w), max(256, t * h)
            matrix = (
                (vertical, (canvas_h - vertical * h) / 2),
                (horizontal, (canvas_w - horizontal * w) / 2),
            )
            canvas = warp_affine(
                np.asarray(image), matrix, int(canvas_h), int(canvas_w)
            )
            rows, columns = int(canvas_h) - 224, int(canvas_w) - 224
            if training:
                y, x = int(draws[2] * (rows + 1)), int(draws[3] * (columns + 1))
                ours = crops.random_crop(content, "scale_aspect", 224, draws)
            else:
                y, x = rows // 2, columns // 2
                ours = crops.center_crop(content, "scale_aspect", 224)
            expected = np.rint(canvas[y : y + 224, x : x + 224])
            assert_near(ours, expected, share=0.02)
        corners = itertools.product((0, rows), (0, columns))
        views = crops.ten_crops(content, "scale_aspect", 224)[1:5]
        for view, (y, x) in zip(views, corners, strict=True):
            expected = np.rint(canvas[y : y + 224, x : x + 224])
            assert_near(view, expected, share=0.02)


def test_narrow_images_show_the_canvas():
    content = encode(Image.new("RGB", (480, 480), (0, 255, 0)))
    draws = np.zeros(crops.DRAWS)  # smallest scale, flattest aspect, upper left window
    ours = crops.random_crop(content, "scale_aspect", 224, draws)
    np.testing.assert_array_equal(ours[0], [crops.CANVAS] * 224)
    assert (ours[-1, :, 1] > 250).all()


def test_inception_windows_are_as_published():
    size, count = 1000, 20_000
    windows = [crops.random_window(size, size, x) for x in draws_for(count)]
    top, left, height, width = np.array(windows).T
    assert (top >= 0).all()
    assert (top + height <= size).all()
    assert (left + width <= size).all()
    area, ratio = height * width / size**2, width / height
    assert 0.0795 < area.min() < 0.082
    assert area.max() <= 1
    assert 0.748 < ratio.min() < 0.76
    assert 1.32 < ratio.max() < 1.337
    # Half are swapped, so portrait and landscape are equally frequent. Small windows
    # always fit, so their area is uniform.
    assert abs((ratio < 1).mean() - 0.5) < 0.02
    small = np.sort(area[area < 0.5])
    np.testing.assert_allclose(np.quantile(small, 0.5), 0.29, atol=0.01)
    for start, side in ((top, height), (left, width)):
        share = start / np.maximum(size - side, 1)
        share = share[size - side > 50]
        quartiles = np.quantile(share, [0.25, 0.5, 0.75])
        np.testing.assert_allclose(quartiles, [0.25, 0.5, 0.75], atol=0.02)


def test_the_central_square_is_used_if_nothing_fits():
    draws = np.ones(
        (crops.TRIES, 5)
    )  # the whole area, landscape: too wide for 10 x 900
    assert crops.random_window(10, 900, draws.ravel()) == (445, 0, 10, 10)


@pytest.mark.parametrize("shape", [(40, 1200), (1200, 40)])
@pytest.mark.parametrize("size", [224, 32])
def test_inception_scales_if_nothing_fits(shape, size):
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    content = encode(Image.fromarray(pixels), "png")
    draws = np.ones(crops.DRAWS)  # the whole area, ten times
    ours = crops.random_crop(content, "inception", size, draws)
    assert_near(ours, torch_middle(pixels, size, size))

    image = Image.fromarray(pixels).crop(
        [(s - 40) // 2 + k for k in (0, 40) for s in shape[::-1]]
    )
    expected = np.asarray(image.resize((size, size), Image.BILINEAR))
    ours = crops.random_crop(content, "random_resized", size, draws)
    np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("crop", crops.CROPS)
@pytest.mark.parametrize("size", [(1, 1), (2, 60), (60, 2)])
def test_the_smallest_images_are_cropped(crop, size):
    content = encode(Image.new("RGB", size, (10, 200, 30)))
    for pixels in (
        crops.random_crop(content, crop, 224, draws_for(1)[0]),
        crops.center_crop(content, crop, 224),
    ):
        assert pixels.shape == (224, 224, 3)
        middle = pixels[112, 112].astype(int)
        assert np.abs(middle - (10, 200, 30)).max() < 4


@pytest.mark.parametrize("size", [224, 32])
def test_ten_crops_equal_torchs(generated, size):
    """Centre and corners of the resized image, then those of its mirror image."""
    for content in generated:
        pixels, side = whole(content), round(size * 256 / 224)
        height, width = (side * x // min(pixels.shape[:2]) for x in pixels.shape[:2])
        resized = torch_bicubic(pixels, (height, width))
        down, right = height - size, width - size
        corners = [(0, 0), (0, right), (down, 0), (down, right)]
        centre = math.ceil(down / 2), math.ceil(right / 2)
        expected = [
            image[y : y + size, x : x + size]
            for image in (resized, resized[:, ::-1])
            for y, x in [centre, *corners]
        ]
        assert_near(crops.ten_crops(content, "inception", size), np.stack(expected))


@pytest.mark.parametrize("crop", ["inception", "random_resized"])
def test_the_corners_of_the_mirror_image_are_mirrored_corners(generated, crop):
    for content in generated:
        views = crops.ten_crops(content, crop, 32)
        centre = crops.center_crop(content, crop, 32)
        np.testing.assert_array_equal(views[0], centre)
        for view, mirrored in zip((1, 2, 3, 4), (7, 6, 9, 8), strict=True):
            assert_near(views[view], views[mirrored][:, ::-1], levels=2, share=0.05)
        assert len({view.tobytes() for view in views}) == 10

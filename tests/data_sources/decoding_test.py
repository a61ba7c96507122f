"""Images are decoded as a viewer shows them, or rejected if they are damaged."""

import io

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from data_sources import DataError, crops, decoding
from tests.support.mini_imagenet import encode, wave


def whole(content):
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def draws_for(count):
    return np.random.default_rng(0).random((count, crops.DRAWS))


def save(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decode(content, *window, **options):
    return decoding.decode(content, Image.open(io.BytesIO(content)), *window, **options)


@pytest.mark.parametrize(
    ("mode", "kind"), [("RGB", "jpeg"), ("L", "jpeg"), ("CMYK", "jpeg"), ("RGB", "png")]
)
@pytest.mark.parametrize("orientation", range(10))
def test_images_are_turned_upright_as_a_viewer_does(mode, kind, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation  # 0 and 9 mean nothing
    image = wave(np.random.default_rng(0), 1).resize((30, 20)).convert(mode)
    content = save(image, kind, exif=exif)
    upright = whole(content)
    if 0 < orientation < 9:
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
        upright = np.asarray(upright.convert("RGB"))
    np.testing.assert_array_equal(decode(content), upright)
    window = decode(content, (3, 4, 10, 12))
    np.testing.assert_array_equal(window, upright[3:13, 4:16])
    np.testing.assert_array_equal(decode(content, as_stored=True), whole(content))

    draws = draws_for(1)[0]
    plain = save(Image.fromarray(upright), "png")
    for crop in crops.CROPS:
        np.testing.assert_array_equal(
            crops.random_crop(content, crop, 32, draws),
            crops.random_crop(plain, crop, 32, draws),
        )


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_data_is_ignored():
    image = Image.new("RGB", (8, 8))
    content = save(image, "jpeg", exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff")
    assert decode(content).shape == (8, 8, 3)


def transparent():
    """Returns name -> PNG with two pixels: one clear, one opaque and dark."""
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 10, 20, 1, 2, 3])
    palette.putpixel((1, 0), 1)
    grey = Image.new("L", (2, 1), 9)
    grey.putpixel((0, 0), 200)
    color = Image.fromarray(np.array([[[200, 10, 20, 0], [1, 2, 3, 255]]], np.uint8))
    return {
        "RGBA": save(color, "png"),
        "LA": save(color.convert("LA"), "png"),
        "palette": save(palette, "png", transparency=0),
        "key": save(color.convert("RGB"), "png", transparency=(200, 10, 20)),
        "grey key": save(grey, "png", transparency=200),
    }


@pytest.mark.parametrize("kind", transparent())
def test_transparent_images_lie_over_white(kind):
    content = transparent()[kind]
    clear, opaque = decode(content)[0]
    np.testing.assert_array_equal(clear, decoding.BACKGROUND)
    assert opaque.max() < 10
    np.testing.assert_array_equal(decode(content, as_stored=True), whole(content))


def test_half_transparent_pixels_are_mixed_with_white():
    content = save(Image.new("RGBA", (1, 1), (0, 100, 255, 51)), "png")  # 20 %
    np.testing.assert_array_equal(decode(content)[0, 0], [204, 224, 255])


@pytest.mark.parametrize("kind", ["png", "tiff", "ppm"])
def test_16_bits_are_scaled_to_8(kind):
    values = np.array([[0, 255, 256, 32767, 32768, 65535]], np.uint16)
    pixels = decode(save(Image.fromarray(values), kind))
    np.testing.assert_array_equal(pixels[..., 0], [[0, 0, 1, 127, 128, 255]])
    assert pixels.shape == (1, 6, 3)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_32_bits_are_rejected(dtype):
    content = save(Image.fromarray(np.zeros((9, 9), dtype)), "tiff")
    with pytest.raises(DataError, match=r"32 bits a channel .* convert it to 8 bits"):
        crops.center_crop(content, "inception", 32)


def test_images_beyond_pillows_limit_are_rejected(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    content = encode(Image.new("RGB", (9, 9)))
    for crop in (crops.center_crop, crops.random_crop):
        draws = [draws_for(1)[0]] if crop is crops.random_crop else []
        with pytest.raises(DataError, match="more than 80 pixels, Pillow's limit"):
            crop(content, "inception", 32, *draws)


def with_thumbnail(image, **options):
    """Encodes a JPEG with a complete thumbnail in its header, as cameras do."""
    header = b"Exif\x00\x00" + encode(image.resize((16, 16)))
    buffer = io.BytesIO()
    image.save(buffer, "jpeg", exif=header, quality=90, **options)
    assert buffer.getvalue().count(b"\xff\xd9") == 2
    return buffer.getvalue()


@pytest.mark.parametrize("progressive", [True, False])
@pytest.mark.parametrize("crop", crops.CROPS)
def test_a_truncated_jpeg_is_rejected_by_every_crop(crop, progressive):
    image = wave(np.random.default_rng(1), 2).resize((90, 80))
    content = with_thumbnail(image, progressive=progressive)
    for draws in draws_for(30):
        for cut in (-2, -1, -100, len(content) // 2, 2 * len(content) // 3):
            for filled in (content[:cut], content[:cut].ljust(len(content), b"\0")):
                with pytest.raises(ValueError, match="truncated"):
                    crops.random_crop(filled, crop, 32, draws)
        whole = crops.random_crop(content, crop, 32, draws)
        for appended in (b"\0" * 3000, b"\n", bytes(range(256)) * 20):
            ours = crops.random_crop(content + appended, crop, 32, draws)
            np.testing.assert_array_equal(ours, whole)

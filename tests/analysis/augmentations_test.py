"""The sheet shows what the input pipeline and the train step make of images."""

import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from analysis import augmentations
from configs import cfmz


@pytest.fixture
def config():
    config = cfmz.get_config("20,digits")
    config.data.pipeline = "device"  # same images, without TensorFlow
    config.data.border = "zero"
    return config


def test_versions_are_crops_of_the_same_image(config):
    plain, augmented, shares = augmentations.versions(config, 4, 3)
    assert plain.shape == (4, 32, 32, 3)
    assert augmented.shape == (3, 4, 32, 32, 3)
    np.testing.assert_array_equal(shares, np.broadcast_to(np.eye(4), (3, 4, 4)))
    padded = np.pad(plain, ((0, 0), (4, 4), (4, 4), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (32, 32), axis=(1, 2))
    for step in augmented:
        for image, crops in zip(step, windows, strict=True):
            found = (crops == image.transpose(2, 0, 1)).all(axis=(2, 3, 4))
            assert found.sum() == 1
    assert (augmented[0] != augmented[1]).any()


def test_shares_are_the_weights_of_the_mixed_images(config):
    config.data.pad = 0
    config.augment.mixup = 1.0
    plain, augmented, shares = augmentations.versions(config, 4, 2)
    mixed = np.einsum("vij,jhwc->vihwc", shares, plain.astype(float))
    np.testing.assert_allclose(augmented, mixed, atol=0.51)
    assert ((shares > 0).sum(axis=-1) == 2).all()


@pytest.mark.slow
def test_the_command_writes_a_sheet_with_captions(tmp_path):
    out = tmp_path / "sheet.png"
    command = [sys.executable, "-m", "analysis.augmentations", f"--out={out}"]
    config = ["--config=configs/cfmz.py:20,digits", "--config.data.pipeline=device"]
    sizes = ["--images=4", "--versions=2"]
    mixing = ["--config.augment.ricap=0.5"]
    done = subprocess.run(
        [*command, *config, *mixing, *sizes], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    pixels = np.asarray(Image.open(out))
    # Four rows of 96 pixels, two lines of captions; three columns.
    assert pixels.shape == (4 + 4 * (96 + 32 + 4), 24 + 3 * (96 + 4), 3)
    captions = pixels[100:132]
    assert (captions[:, :120] == 255).all()  # none below the plain image
    assert (captions[:, 128:] < 128).any()


def test_a_gallery_has_a_titled_sheet_for_each_entry(config, monkeypatch):
    entries = (({"augment.cutout": 8}, 1), ({"augment.mixup": 1.0}, 2))
    monkeypatch.setattr(augmentations, "GALLERY", entries)
    pixels = np.asarray(augmentations.gallery(config, 2))
    heights = [4 + 96 + 4, 4 + 2 * (96 + 16 + 4)]
    assert pixels.shape == (2 * 26 + sum(heights), 24 + 3 * (96 + 4), 3)
    for top in (0, 26 + heights[0]):
        assert (pixels[top : top + 26] < 128).any()  # the title


def test_every_augmentation_is_in_the_gallery():
    drawn = {name for fields, _ in augmentations.GALLERY for name in fields}
    options = {f"augment.{name}" for name in cfmz.get_config().augment}
    assert options <= drawn


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--config.augment.mixup=1.0", "--images=3"], "mixup mixes .* groups of 2"),
        (["--config.augment.mixupp=1.0"], r"mixupp.*did you mean .*mixup "),
    ],
)
def test_errors_are_one_line(arguments, named, tmp_path):
    command = [sys.executable, "-m", "analysis.augmentations"]
    command += [f"--out={tmp_path / 'x.png'}", "--config=configs/cfmz.py:20,digits"]
    done = subprocess.run(
        [*command, "--config.data.pipeline=device", *arguments],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (line,) = [x for x in done.stderr.splitlines() if x.startswith("error:")]
    assert re.search(named, line)

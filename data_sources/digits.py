"""1,797 handwritten digits, 8x8 with 17 grey levels, embedded in digits.npz.

They are the test set of "Optical Recognition of Handwritten Digits" (E. Alpaydin and
C. Kaynak, 1998, UCI Machine Learning Repository, https://doi.org/10.24432/C50P49,
licence CC BY 4.0), with the order and values of scikit-learn's load_digits (BSD).
"""

import pathlib

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

FILE = pathlib.Path(__file__).with_name("digits.npz")


def load_images(path: pathlib.Path, data: ConfigDict, split: str):
    """Returns images (N, 32, 32, 3) uint8, labels (N,) and the classes.

    Bilinear to 32x32, three equal channels, 0..16 stretched to 0..255. Every fifth
    digit, beginning with the first, is a test image: 1,437 for training, 360 for test.
    """
    with np.load(path) as file:
        images, labels = file["images"], file["labels"]
    test = np.arange(len(labels)) % 5 == 0
    chosen = test if split == "test" else ~test
    small = np.rint(images[chosen] * (255 / 16)).astype(np.uint8)
    large = [Image.fromarray(x).resize((32, 32), Image.BILINEAR) for x in small]
    return np.repeat(np.stack(large)[..., None], 3, axis=-1), labels[chosen], range(10)

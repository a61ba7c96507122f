"""Borders around images in memory, for random crops."""

from collections.abc import Sequence

import numpy as np

BORDERS = ("zero", "mean", "dataset_mean", "white", "reflect")


def pad_images(
    images: np.ndarray, pad: int, border: str, mean: Sequence[float] = (0.0,)
) -> np.ndarray:
    """Pads (N, H, W, C) uint8 by `pad` pixels on each side, for random crops.

    border:
      zero          black, before normalisation (X-Nets).
      dataset_mean  `mean`, per channel, 0..255, rounded: fb.resnet.torch's zeros after
                    normalisation (at most 0.5 of 255 off).
      mean          cfmz: the rows above and below repeat the rounded mean row of the
                    image, then the columns left and right repeat the rounded mean
                    column of the result; halves round to even, as in numpy.
      white
      reflect       without repeating the edge.

    Raises ValueError for an unknown border.
    """
    if border not in BORDERS:
        raise ValueError(f"unknown border {border!r}: choose from {', '.join(BORDERS)}")
    edges = ((0, 0), (pad, pad), (pad, pad), (0, 0))
    if border == "reflect":
        return np.pad(images, edges, mode="reflect")
    n, height, width, channels = images.shape
    fill = {"dataset_mean": np.rint(mean), "white": 255}.get(border, 0)
    padded = np.empty((n, height + 2 * pad, width + 2 * pad, channels), np.uint8)
    padded[:] = fill
    padded[:, pad : pad + height, pad : pad + width] = images
    if border == "mean" and pad:
        # In pieces, because the sums of a whole data set need much memory.
        for start in range(0, n, 1000):
            _fill_with_mean(padded[start : start + 1000], pad)
    return padded


def _fill_with_mean(padded: np.ndarray, pad: int) -> None:
    rows = padded[:, pad:-pad, pad:-pad].mean(axis=1, keepdims=True)
    padded[:, :pad, pad:-pad] = padded[:, -pad:, pad:-pad] = np.rint(rows)
    columns = padded[:, :, pad:-pad].mean(axis=2, keepdims=True)
    padded[:, :, :pad] = padded[:, :, -pad:] = np.rint(columns)

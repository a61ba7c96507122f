"""Transformations that mix the images of a batch, and their labels.

Draws that a batch shares (lambda, a box, a boundary) come from one key, which is the
same on all devices. Row r of the batch is mixed with row r XOR 1, in RICAP also with
r XOR 2 and r XOR 3. These rows are on the same device for any number of devices. The
originals pair images by a random permutation. A batch is already a random sample in
random order, so the pairs have the same distribution, except that an image is never
its own partner.
"""

import jax
import jax.numpy as jnp
import numpy as np

from augment.geometry import box

NAMES = ("mixup", "cutmix", "ricap")


def mixup(
    key: jax.Array, x: jax.Array, targets: jax.Array, alpha: float
) -> tuple[jax.Array, jax.Array]:
    """Applies mixup (arXiv 1710.09412): lambda x + (1 - lambda) partner.

    x: (b, H, W, C); targets: (b, classes); lambda ~ Beta(alpha, alpha), one per batch.
    """
    share = jax.random.beta(key, alpha, alpha)
    return _blend(x, share).astype(x.dtype), _blend(targets, share)


def cutmix(
    key: jax.Array, x: jax.Array, targets: jax.Array, alpha: float, probability: float
) -> tuple[jax.Array, jax.Array]:
    """Applies CutMix (arXiv 1905.04899): pastes a box of the partner, one per batch.

    x: (b, H, W, C); targets: (b, classes). The box covers the share 1 - lambda of the
    area, lambda ~ Beta(alpha, alpha), around any pixel, and is clipped at the edges;
    targets are weighted by the remaining pixels. probability: that a batch is cut.
    """
    share_key, centre_key, whether_key = jax.random.split(key, 3)
    side = jnp.sqrt(1 - jax.random.beta(share_key, alpha, alpha))
    cut = jax.random.uniform(whether_key) < probability
    size = np.array(x.shape[1:3])
    half = (size * side).astype(jnp.int32) // 2 * cut
    centre = jax.random.randint(centre_key, (2,), 0, size)
    start, stop = (jnp.clip(centre + d, 0, size) for d in (-half, half))
    share = 1 - jnp.prod(stop - start) / size.prod()
    x = jnp.where(box(size, start, stop), _partners(x, 1), x)
    return x, _blend(targets, share)


def ricap(
    key: jax.Array, x: jax.Array, targets: jax.Array, beta: float
) -> tuple[jax.Array, jax.Array]:
    """Applies RICAP (arXiv 1811.09030): patches four crops, weights targets by area.

    x: (b, H, W, C); targets: (b, classes); b is a multiple of 4. As in the authors'
    code, the boundary, at Beta(beta, beta) of each side, and the position of each crop
    within its image are drawn once per batch. The order is upper left (the image's
    own), upper right, lower left, lower right.
    """
    size = np.array(x.shape[1:3])
    keys = jax.random.split(key, 5)
    boundary = jnp.round(size * jax.random.beta(keys[4], beta, beta, (2,)))
    boundary = boundary.astype(jnp.int32)
    patched, mixed = x, jnp.zeros_like(targets)
    for k in range(4):
        beyond = np.array([k >= 2, k % 2 == 1])  # below, and right of, the boundary
        start = jnp.where(beyond, boundary, 0)
        extent = jnp.where(beyond, size - boundary, boundary)
        position = jax.random.randint(keys[k], (2,), 0, size - extent + 1)
        crop = jnp.roll(_partners(x, k), start - position, axis=(1, 2))
        patched = jnp.where(box(size, start, start + extent), crop, patched)
        mixed += jnp.prod(extent) / size.prod() * _partners(targets, k)
    return patched, mixed


def _partners(rows: jax.Array, number: int) -> jax.Array:
    return rows[np.arange(len(rows)) ^ number] if number else rows


def _blend(rows: jax.Array, share: jax.Array) -> jax.Array:
    return share * rows + (1 - share) * _partners(rows, 1)

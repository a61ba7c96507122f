"""Batch transformations that mix images and their labels; inside the train step.

What a batch shares (lambda, a box, a boundary) comes from one key that all devices
have. The partner of row r of the batch is row r XOR 1, RICAP's three are r XOR 1, 2, 3:
they lie on the same device, whatever the number of devices. The originals pair by a
random permutation; a batch is a random sample in random order already, so the pairs
have the same distribution, but for an image never being its own partner.
"""

import jax
import jax.numpy as jnp
import numpy as np

NAMES = ("mixup", "cutmix", "ricap")


def mixup(
    key: jax.Array, x: jax.Array, targets: jax.Array, alpha: float
) -> tuple[jax.Array, jax.Array]:
    """mixup (arXiv 1710.09412): lambda x + (1 - lambda) partner, one lambda a batch.

    x: (b, H, W, C), targets: (b, classes), of both; lambda ~ Beta(alpha, alpha).
    """
    share = jax.random.beta(key, alpha, alpha)
    mixed = share * x + (1 - share) * _partners(x, 1)
    return mixed.astype(x.dtype), _blend(targets, _partners(targets, 1), share)


def cutmix(
    key: jax.Array, x: jax.Array, targets: jax.Array, alpha: float, probability: float
) -> tuple[jax.Array, jax.Array]:
    """CutMix (arXiv 1905.04899): a box of the partner, the same one in a whole batch.

    x: (b, H, W, C), targets: (b, classes). The box has the share 1 - lambda of the
    area, lambda ~ Beta(alpha, alpha), its centre lies anywhere, and the label's share
    is that of the pixels left after clipping at the edges. probability: of a batch to
    be cut at all.
    """
    share_key, centre_key, whether_key = jax.random.split(key, 3)
    side = jnp.sqrt(1 - jax.random.beta(share_key, alpha, alpha))
    cut = jax.random.uniform(whether_key) < probability
    size = np.array(x.shape[1:3])
    half = (size * side).astype(jnp.int32) // 2 * cut
    centre = jax.random.randint(centre_key, (2,), 0, size)
    start, stop = (jnp.clip(centre + d, 0, size) for d in (-half, half))
    rows, columns = (_between(size[i], start[i], stop[i]) for i in (0, 1))
    box = (rows[:, None] & columns)[None, :, :, None]
    share = 1 - jnp.prod(stop - start) / size.prod()
    x = jnp.where(box, _partners(x, 1), x)
    return x, _blend(targets, _partners(targets, 1), share)


def ricap(
    key: jax.Array, x: jax.Array, targets: jax.Array, beta: float
) -> tuple[jax.Array, jax.Array]:
    """RICAP (arXiv 1811.09030): four crops patched, labels weighted by their areas.

    x: (b, H, W, C), targets: (b, classes), b a multiple of 4. As in the authors' code
    the boundary, at Beta(beta, beta) of each side, and the position of each of the four
    crops within its image are drawn once a batch. The order: upper left, upper right,
    lower left, lower right; the upper left one is the image's own.
    """
    size = np.array(x.shape[1:3])
    keys = jax.random.split(key, 5)
    boundary = jnp.round(size * jax.random.beta(keys[4], beta, beta, (2,)))
    boundary = boundary.astype(jnp.int32)
    patched, mixed = x, jnp.zeros_like(targets)
    for k in range(4):
        low = np.array([k >= 2, k % 2 == 1])  # below, to the right of the boundary
        start = jnp.where(low, boundary, 0)
        extent = jnp.where(low, size - boundary, boundary)
        position = jax.random.randint(keys[k], (2,), 0, size - extent + 1)
        crop = jnp.roll(_partners(x, k), start - position, axis=(1, 2))
        rows, columns = (
            _between(size[i], start[i], start[i] + extent[i]) for i in (0, 1)
        )
        inside = (rows[:, None] & columns)[None, :, :, None]
        patched = jnp.where(inside, crop, patched)
        mixed += jnp.prod(extent) / size.prod() * _partners(targets, k)
    return patched, mixed


def _partners(rows: jax.Array, number: int) -> jax.Array:
    return rows[np.arange(len(rows)) ^ number] if number else rows


def _between(length: int, start: jax.Array, stop: jax.Array) -> jax.Array:
    i = np.arange(length)
    return (start <= i) & (i < stop)


def _blend(targets: jax.Array, others: jax.Array, share: jax.Array) -> jax.Array:
    return share * targets + (1 - share) * others

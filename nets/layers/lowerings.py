"""Lowerings: ways to compute a convolution, with equal results and different speeds.

On accelerators `auto` selects XLA's own convolution. On CPU its kernel gradient is
several times slower than a matrix product, and its grouped gradients are slower still,
so `auto` selects by shape: among the lowerings in plain JAX, or the C++ kernels of
nets/layers/cpu where they can be compiled and are faster. `python -m benchmarks.layers`
measures all lowerings.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from nets.layers.cpu import calls

# Rows (pixels) of a chunk's matrix product. More rows exceed the cache (DenseNet-40-24
# trains 10 % slower with 4,096); fewer rows do not occupy all threads.
CHUNK_ROWS = 2048
# For `separated`. Few pieces, because each is compiled separately.
PIECE_ROWS, PIECES = 8192, 4
# For `block_dense`, few blocks for the same reason.
BLOCK_CHANNELS, BLOCKS = 64, 4
# For `cpp`. Small maps with more channels in a group are faster as XLA's products.
CPP_CHANNELS, CPP_PIXELS = 256, 64


@functools.partial(jax.jit, static_argnames=("stride", "padding", "groups", "lowering"))
def convolution(
    x: jax.Array,
    kernel: jax.Array,
    *,
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
    lowering: str = "auto",
) -> jax.Array:
    """Cross-correlates x (N, H, W, in) with kernel (kh, kw, in / groups, out).

    Returns (N, H', W', out) in the dtype of x, H' = (H + 2 padding - kh) // stride + 1.
    Pads `padding` zeros on every side. Falls back to `native` if the named lowering
    does not exist for a shape (see `applicable`), so that one name can be set for a
    whole net, or if `cpp` is named and not usable. Supports reverse-mode derivatives of
    any order, but on CPU no forward mode.
    """
    check(lowering)
    shape = Shape.of(x, kernel, stride, padding, groups)
    if lowering == "auto":
        lowering = choose(shape, jax.default_backend(), calls.usable(x))
    elif lowering == "cpp" and not calls.usable(x):
        lowering = "native"
    if lowering not in applicable(shape):
        lowering = "native"
    return LOWERINGS[lowering].compute(x, kernel.astype(x.dtype), shape)


def check(lowering: str) -> None:
    """Raises ValueError unless `lowering` is 'auto' or the name of a lowering."""
    names = ("auto", *LOWERINGS, *EXPANDER_LOWERINGS)
    if lowering not in names:
        raise ValueError(
            f"unknown lowering {lowering!r}: choose from {', '.join(names)}"
        )


@dataclasses.dataclass(frozen=True)
class Shape:
    """The static properties of a convolution. `size` and `window` are (rows, cols)."""

    images: int
    size: tuple[int, int]
    in_channels: int
    out_channels: int
    window: tuple[int, int]
    stride: int
    padding: int
    groups: int

    @classmethod
    def of(cls, x, kernel, stride: int, padding: int, groups: int) -> "Shape":
        """Reads the sizes of the arrays; raises ValueError if they do not fit."""
        images, *size, channels = x.shape
        *window, depth, out = kernel.shape
        for side, count in (("input", channels), ("output", out)):
            if groups < 1 or count % groups:
                raise ValueError(
                    f"{groups} groups do not divide {count} {side} channels"
                )
        if depth * groups != channels:
            raise ValueError(
                f"a kernel with {depth} inputs in each of {groups} groups needs "
                f"{depth * groups} input channels, got {channels}"
            )
        if any(n + 2 * padding < k for n, k in zip(size, window, strict=True)):
            raise ValueError(
                f"a map of {size} with padding {padding} is smaller than the "
                f"{window} kernel"
            )
        return cls(
            images, tuple(size), channels, out, tuple(window), stride, padding, groups
        )

    @property
    def out_size(self) -> tuple[int, int]:
        """Rows and columns of the output."""
        padded = (n + 2 * self.padding for n in self.size)
        return tuple(
            (n - k) // self.stride + 1 for n, k in zip(padded, self.window, strict=True)
        )

    @property
    def group_inputs(self) -> int:
        """Input channels of each group."""
        return self.in_channels // self.groups

    @property
    def group_outputs(self) -> int:
        """Output channels of each group."""
        return self.out_channels // self.groups

    @property
    def pointwise(self) -> bool:
        """Whether this is an unpadded 1x1 convolution."""
        return self.window == (1, 1) and self.padding == 0


def choose(shape: Shape, platform: str, cpp: bool = False) -> str:
    """Returns the lowering of `auto`, by the times in benchmarks/results/layers-*.

    cpp: whether the C++ kernels can be used.
    """
    if platform != "cpu":
        return "native"
    if cpp and _faster_in_cpp(shape):
        return "cpp"
    if shape.groups > 1:
        if LOWERINGS["taps"].exists(shape):
            return "taps"
        return "dot" if shape.pointwise else "block_dense"
    if shape.pointwise:
        return "dot"
    if shape.stride > 1:  # `gathered` does not pay for the few channels of a stem
        return "gathered" if shape.in_channels >= 8 else "native"
    if 2 * shape.out_channels <= shape.in_channels:
        return "scattered"
    return "shifted" if 8 <= shape.in_channels < 32 else "separated"


def _faster_in_cpp(shape: Shape) -> bool:
    if shape.pointwise and shape.groups == 1:  # a single matrix product
        return False
    few_channels = max(shape.group_inputs, shape.group_outputs) <= CPP_CHANNELS
    fast = few_channels or math.prod(shape.out_size) >= CPP_PIXELS
    return fast and LOWERINGS["cpp"].exists(shape)


def applicable(shape: Shape) -> list[str]:
    """Returns the names of the lowerings that exist for this shape."""
    return [name for name, lowering in LOWERINGS.items() if lowering.exists(shape)]


def native(x: jax.Array, kernel: jax.Array, shape: Shape) -> jax.Array:
    """Computes XLA's convolution, differentiated by JAX."""
    return lax.conv_general_dilated(
        x,
        kernel,
        (shape.stride, shape.stride),
        ((shape.padding, shape.padding), (shape.padding, shape.padding)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=shape.groups,
    )


# Saves the arguments of a lowering for the gradient, not its rearranged copies. Without
# prevent_cse, XLA could merge the copies of both passes, but ResNet-18 needs no more
# memory.
_keep_arguments = functools.partial(
    jax.checkpoint, static_argnums=(2,), prevent_cse=False
)


@_keep_arguments
def dot(x: jax.Array, kernel: jax.Array, shape: Shape) -> jax.Array:
    """1x1: a matrix product over pixels for each group, after subsampling."""
    x = x[:, :: shape.stride, :: shape.stride]
    # Flattened, since XLA:CPU transposes an (N, H, W, in) map for the kernel gradient.
    groups = jnp.split(x.reshape(-1, shape.in_channels), shape.groups, axis=-1)
    kernels = jnp.split(kernel[0, 0], shape.groups, axis=-1)
    y = [x @ kernel for x, kernel in zip(groups, kernels, strict=True)]
    return jnp.concatenate(y, axis=-1).reshape(*x.shape[:-1], shape.out_channels)


def einsum(x: jax.Array, kernel: jax.Array, shape: Shape) -> jax.Array:
    """1x1 in groups: one batched matrix product, for accelerators; `dot` on CPU."""
    x = x[:, :: shape.stride, :: shape.stride]
    y = jnp.einsum(
        "pgi,igo->pgo",
        x.reshape(-1, shape.groups, shape.group_inputs),
        kernel.reshape(shape.group_inputs, shape.groups, -1),
    )
    return y.reshape(*x.shape[:-1], shape.out_channels)


def block_dense(x: jax.Array, kernel: jax.Array, shape: Shape) -> jax.Array:
    """Merges groups into dense kernels with the groups on their diagonals.

    This costs more arithmetic, but the products are large enough to be fast. A kernel
    spans up to BLOCK_CHANNELS inputs, or more if BLOCKS kernels would not suffice.
    """
    widest = max(BLOCK_CHANNELS, shape.in_channels // BLOCKS)
    merged = max(
        m
        for m in range(1, shape.groups + 1)
        if shape.groups % m == 0 and (m * shape.group_inputs <= widest or m == 1)
    )
    blocks = shape.groups // merged
    # Six axes: a sum of products over one of seven crashes XLA:CPU (jax issue 40412).
    kernel = kernel.reshape(
        -1, 1, shape.group_inputs, blocks, merged, shape.group_outputs
    )
    kernel = kernel * jnp.eye(merged, dtype=kernel.dtype)[:, None, None, :, None]
    block = dataclasses.replace(
        shape,
        in_channels=shape.in_channels // blocks,
        out_channels=shape.out_channels // blocks,
        groups=1,
    )
    kernel = kernel.reshape(*shape.window, block.in_channels, shape.out_channels)
    compute = LOWERINGS[choose(block, "cpu")].compute
    pieces = zip(
        jnp.split(x, blocks, axis=-1), jnp.split(kernel, blocks, axis=-1), strict=True
    )
    return jnp.concatenate([compute(x, k, block) for x, k in pieces], axis=-1)


def taps(x: jax.Array, kernel: jax.Array, shape: Shape) -> jax.Array:
    """Direct convolution for depthwise layers and groups of two channels.

    Sums shifted maps, each times one value per channel.
    """
    p, dtype = shape.padding, jnp.promote_types(x.dtype, jnp.float32)
    maps = jnp.pad(x.astype(dtype), ((0, 0), (p, p), (p, p), (0, 0)))
    maps = maps.reshape(*maps.shape[:-1], shape.groups, -1)
    kernel = kernel.astype(dtype)
    kernel = kernel.reshape(-1, shape.group_inputs, shape.groups, shape.group_outputs)
    outputs = []
    for o in range(shape.group_outputs):
        total = jnp.zeros((), dtype)
        for i in range(shape.group_inputs):
            pieces = _slices(maps[..., i], shape.window, shape.stride, shape.out_size)
            for tap, piece in enumerate(pieces):
                total += piece * kernel[tap, i, :, o]
        outputs.append(total.astype(x.dtype))
    y = jnp.stack(outputs, axis=-1)
    return y.reshape(*y.shape[:-2], shape.out_channels)


@_keep_arguments
def gathered(x: jax.Array, kernel: jax.Array, shape: Shape) -> jax.Array:
    """im2col: one matrix product over copies of x, one per tap. For strided layers."""
    p = shape.padding
    x = jnp.pad(x, ((0, 0), (p, p), (p, p), (0, 0)))
    copies = _slices(x, shape.window, shape.stride, shape.out_size)
    kernel = kernel.reshape(-1, shape.out_channels)
    return _flat_product(jnp.concatenate([*copies], -1), kernel)


@_keep_arguments
def separated(x: jax.Array, kernel: jax.Array, shape: Shape) -> jax.Array:
    """Stride 1: im2col over the window's columns, shift-and-add over its rows.

    Copies window + window maps, where `gathered` copies window * window. The pieces of
    a batch share no operation, so threads need not synchronise within a piece.
    """
    (rows, cols), p = shape.window, shape.padding
    columns = kernel.transpose(1, 2, 0, 3).reshape(cols * shape.in_channels, -1)

    @jax.checkpoint
    def product(x, columns):
        copies = [_shift(x, 2, j - p, shape.out_size[1]) for j in range(cols)]
        z = jnp.split(_flat_product(jnp.concatenate(copies, -1), columns), rows, -1)
        return sum(_shift(z[i], 1, i - p, shape.out_size[0]) for i in range(rows))

    wanted = math.ceil(shape.images * math.prod(shape.out_size) / PIECE_ROWS)
    count = min(wanted, PIECES, shape.images)
    return jnp.concatenate([product(x, columns) for x in jnp.array_split(x, count)])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def shifted(x: jax.Array, kernel: jax.Array, shape: Shape) -> jax.Array:
    """Stride 1: `native` forward pass, gradients from `_gradients`."""
    return native(x, kernel, shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def scattered(x: jax.Array, kernel: jax.Array, shape: Shape) -> jax.Array:
    """Stride 1: product first, then shift-and-add: one matrix product for all taps.

    The product has taps * out columns, so this suits layers with fewer outputs than
    inputs. `_gradients` computes the gradients.
    """
    p, out = shape.padding, shape.out_channels
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    columns = _columns(kernel)

    def chunk(x):
        z = jnp.matmul(x, columns, preferred_element_type=dtype)
        z = jnp.pad(z, ((0, 0), (p, p), (p, p), (0, 0)))
        pieces = enumerate(_slices(z, shape.window, 1, shape.out_size))
        y = sum(piece[..., i * out : (i + 1) * out] for i, piece in pieces)
        return y.astype(x.dtype), None

    y, _ = _over_chunks(chunk, shape, x)
    return y


def _forward(compute, x, kernel, shape):
    return compute(x, kernel, shape), (x, kernel)


def _gradients(shape: Shape, residuals, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns both gradients, products with the same copies of dy, one per tap."""
    x, kernel = residuals
    # dx[h, w] = sum over taps of dy[h + p - i, w + p - j] kernel[i, j]
    rows, cols = (k - 1 - shape.padding for k in shape.window)
    edges = ((0, 0, 0), (rows, rows, 0), (cols, cols, 0), (0, 0, 0))
    columns = _columns(kernel[::-1, ::-1])

    def chunk(x, dy):
        # lax.pad, because edges are negative if the padding exceeds the window.
        dy = lax.pad(dy, jnp.zeros((), dy.dtype), edges)
        copies = jnp.concatenate([*_slices(dy, shape.window, 1, shape.size)], -1)
        return _flat_product(copies, columns.T), _product_of_transposed(x, copies)

    dx, dw = _over_chunks(chunk, shape, x, dy)
    dw = dw.reshape(shape.in_channels, *shape.window, -1)[:, ::-1, ::-1]
    return dx, dw.transpose(1, 2, 0, 3).astype(x.dtype)


shifted.defvjp(functools.partial(_forward, shifted), _gradients)
scattered.defvjp(functools.partial(_forward, scattered), _gradients)


def _columns(kernel):
    """(kh, kw, in, out) -> (in, kh * kw * out)"""
    return kernel.transpose(2, 0, 1, 3).reshape(kernel.shape[2], -1)


def _shift(x, axis: int, by: int, size: int):
    """Returns y[i] = x[i + by] for i < size along an axis, zero outside of x."""
    edges = [(0, 0, 0)] * x.ndim
    edges[axis] = (-by, size - x.shape[axis] + by, 0)
    return lax.pad(x, jnp.zeros((), x.dtype), edges)


def _flat_product(x, matrix):
    """(..., a) @ (a, b) with all leading axes flattened."""
    return (x.reshape(-1, x.shape[-1]) @ matrix).reshape(*x.shape[:-1], -1)


def _slices(x, window, stride, size):
    """Yields the pixels (N, *size, C) that each tap of a window reads."""
    rows, cols = (stride * (n - 1) + 1 for n in size)
    for i in range(window[0]):
        for j in range(window[1]):
            yield x[:, i : i + rows : stride, j : j + cols : stride]


def _product_of_transposed(x, y):
    """(..., a) and (..., b) -> (a, b), summed over pixels in at least float32."""
    x, y = (z.reshape(-1, z.shape[-1]) for z in (x, y))
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    return lax.dot_general(x, y, (((0,), (0,)), ((), ())), preferred_element_type=dtype)


def _over_chunks(chunk: Callable, shape: Shape, *arrays: jax.Array):
    """Applies chunk(*arrays) -> (values per image, sum over images) to all images."""
    most = max(1, CHUNK_ROWS // math.prod(shape.out_size))
    size = max(n for n in range(1, most + 1) if shape.images % n == 0)
    if size == shape.images:
        return chunk(*arrays)

    # Slices of whole arrays, because XLA computes the producer of an array a second
    # time if lax.scan runs over a reshaped one.
    def body(i, carry):
        whole, total = carry
        pieces = (lax.dynamic_slice_in_dim(x, i * size, size) for x in arrays)
        piece, part = chunk(*pieces)
        insert = functools.partial(
            lax.dynamic_update_slice_in_dim, start_index=i * size, axis=0
        )
        return jax.tree.map(insert, whole, piece), jax.tree.map(jnp.add, total, part)

    piece, part = jax.eval_shape(chunk, *(x[:size] for x in arrays))
    whole, total = jax.tree.map(
        lambda a: jnp.zeros(a.shape, a.dtype),
        (
            jax.tree.map(lambda a: a.update(shape=(shape.images, *a.shape[1:])), piece),
            part,
        ),
    )
    return lax.fori_loop(0, shape.images // size, body, (whole, total))


class Lowering(NamedTuple):
    """A way to compute a convolution, and whether it exists for a shape."""

    compute: Callable[[jax.Array, jax.Array, Shape], jax.Array]
    exists: Callable[[Shape], bool]


def _stride_1(shape: Shape) -> bool:
    return shape.groups == 1 and shape.stride == 1


LOWERINGS = {
    "native": Lowering(native, lambda shape: True),
    "cpp": Lowering(
        calls.convolution, lambda shape: shape.window[0] == shape.window[1]
    ),
    "dot": Lowering(dot, lambda shape: shape.pointwise),
    "gathered": Lowering(gathered, lambda shape: shape.groups == 1),
    "separated": Lowering(separated, _stride_1),
    "shifted": Lowering(shifted, _stride_1),
    "scattered": Lowering(scattered, _stride_1),
    "block_dense": Lowering(block_dense, lambda shape: shape.groups > 1),
    "einsum": Lowering(einsum, lambda shape: shape.groups > 1 and shape.pointwise),
    "taps": Lowering(
        taps,
        lambda shape: (
            shape.groups > 1 and shape.group_inputs * shape.group_outputs <= 4
        ),
    ),
}
# Lowerings of expander layers, which start from edges instead of a dense kernel.
EXPANDER_LOWERINGS = ("blocks",)

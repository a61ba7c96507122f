"""The C++ kernels of this folder, called through jax.ffi.

A convolution is linear in its input and in its weights, so each of its derivatives, of
any order, is again one of three functions, all of which are kernels. The sums
(`weighted_sum`, `map_moments` and so on) have no derivatives here: see `use_kernel`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from nets.layers.cpu import build


def usable(x: jax.Array) -> bool:
    """Returns whether the kernels can compute with x here.

    They require a CPU, float32 or bfloat16, and a C++ compiler. XLA cannot partition a
    call, so with several devices they also require a shard_map over all axes, as in
    train.py.
    """
    if jax.default_backend() != "cpu" or x.dtype not in (jnp.float32, jnp.bfloat16):
        return False
    mesh = jax.sharding.get_abstract_mesh()
    if jax.device_count() > 1 and not (mesh.axis_names and mesh.are_all_axes_manual):
        return False
    return build.load() is not None


def usable_in_float32(x: jax.Array) -> bool:
    """Returns whether x is float32 and the kernels can compute with it here.

    For kernels that take only float32: a bfloat16 map would have to be copied.
    """
    return x.dtype == jnp.float32 and usable(x)


def use_kernel(kernel: Callable) -> Callable:
    """Returns a decorator that computes a function by `kernel` wherever that is usable.

    It is usable if all arrays satisfy `usable_in_float32`. Derivatives are always those
    of the decorated function; there is no forward mode.
    """

    def decorate(function):
        @jax.custom_vjp
        @functools.wraps(function)
        def compute(*args):
            fits = all(map(usable_in_float32, jax.tree.leaves(args)))
            return kernel(*args) if fits else function(*args)

        def backward(args, gradient):
            return jax.vjp(function, *args)[1](gradient)

        compute.defvjp(lambda *args: (compute(*args), args), backward)
        return compute

    return decorate


def convolution(x: jax.Array, kernel: jax.Array, shape) -> jax.Array:
    """Computes the convolution of `shape`, a lowerings.Shape with a square window."""
    return _convolution(x, kernel, None, shape)


def sparse_convolution(x: jax.Array, values: jax.Array, edges: jax.Array, shape):
    """Convolves over the connected pairs of channels only, in time proportional to E.

    values: (k, k, E), for edges (E,) int32, the indices input * out_channels + output.
    shape: a lowerings.Shape with stride 1, one group and less padding than its window.
    """
    if shape.stride > 1 or shape.groups > 1 or shape.padding >= shape.window[0]:
        raise ValueError(f"no sparse convolution exists for {shape}")
    if values.shape != (*shape.window, *edges.shape):
        raise ValueError(
            f"values of shape {values.shape} do not fit a {shape.window} window and "
            f"{edges.shape} edges"
        )
    if not shape.pointwise:
        return _sparse(x, values, edges, shape)
    # All pixels in one column, so that vectors are full even if maps are small.
    size = (shape.images * math.prod(shape.size), 1)
    shape = dataclasses.replace(shape, images=1, size=size)
    y = _sparse(x.reshape(1, *size, shape.in_channels), values, edges, shape)
    return y.reshape(*x.shape[:-1], shape.out_channels)


def weighted_sum(
    maps: Sequence[jax.Array],
    weights: jax.Array,
    shift: jax.Array,
    *,
    relu: bool = False,
) -> jax.Array:
    """Adds a shift (G, C) and maps (G, P, C), each times its weights (G, maps, C).

    relu: whether to return the ReLU of the sum.
    All arrays are float32. Has no derivative.
    """
    call = _kernel("weighted_sum", maps[0].shape)
    return call(weights, shift, *maps, relu=np.int64(relu))


def weights_gradients(x: jax.Array, weights: jax.Array, dys: Sequence[jax.Array]):
    """Returns the gradients of x and weights. dys: those of the products x weights_i.

    All arrays are float32. Has no derivative.
    """
    return _kernel("weights_gradients", x.shape, weights.shape)(x, weights, *dys)


def map_moments(x: jax.Array, reference: jax.Array) -> jax.Array:
    """Returns the sums over pixels of x - reference and of its square: (2, G, C).

    x: (G, P, C). reference: (G, C). All arrays are float32. Has no derivative.
    """
    return _kernel("map_moments", (2, len(x), x.shape[-1]))(x, reference)


def gradient_moments(
    maps: Sequence[jax.Array],
    dy: jax.Array,
    coefficients: jax.Array | None = None,
    limit: float = math.inf,
) -> jax.Array:
    """Returns the sums over pixels of dy and of dy * x: (2, G, C).

    maps: arrays (G, P, channels), whose concatenation is x. dy: (G, P, C).
    coefficients: scale and shift (2, G, C); if given, only those dy are added for which
      0 < scale * x + shift < limit.
    All arrays are float32. Has no derivative.
    """
    size = (2, len(dy), dy.shape[-1])
    if coefficients is None:
        coefficients = jnp.zeros((0, *size[1:]))
    call = _kernel("gradient_moments", size)
    return call(dy, coefficients, *maps, limit=np.float32(limit))


def _differentiable(convolve, input_gradient, weight_gradient):
    """Returns `convolve` with derivatives of all orders.

    The three functions are the partial derivatives of one sum of products of x, w
    (weights) and dy: convolve(x, w), input_gradient(dy, w) and weight_gradient(x, dy).
    Each also takes edges and a static shape.
    """

    def define(function, of_first, of_second):
        @functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
        @functools.wraps(function)
        def compute(a, b, edges, shape):
            return function(a, b, edges, shape)

        def forward(a, b, edges, shape):
            return compute(a, b, edges, shape), (a, b, edges)

        def backward(shape, residuals, cotangent):
            a, b, edges = residuals
            da = of_first(cotangent, a, b, edges, shape)
            return da, of_second(cotangent, a, b, edges, shape), None

        compute.defvjp(forward, backward)
        return compute

    y = define(
        convolve,
        lambda dy, x, w, *rest: dx(dy, w, *rest),
        lambda dy, x, w, *rest: dw(x, dy, *rest),
    )
    dx = define(
        input_gradient,
        lambda t, dy, w, *rest: y(t, w, *rest),
        lambda t, dy, w, *rest: dw(t, dy, *rest),
    )
    dw = define(
        weight_gradient,
        lambda t, x, dy, *rest: dx(dy, t, *rest),
        lambda t, x, dy, *rest: y(x, t, *rest),
    )
    return y


def _convolve(x, kernel, _, shape):
    return _call(
        "convolve",
        (shape.images, *shape.out_size, shape.out_channels),
        (x, kernel),
        stride=shape.stride,
        padding=shape.padding,
        dilation=1,
        groups=shape.groups,
        turn=0,
    )


def _input_gradient(dy, kernel, _, shape):
    """Convolves dy, with stride - 1 zeros between its pixels, by the turned kernel."""
    return _call(
        "convolve",
        (shape.images, *shape.size, shape.in_channels),
        (dy, kernel),
        stride=1,
        padding=shape.window[0] - 1 - shape.padding,
        dilation=shape.stride,
        groups=shape.groups,
        turn=1,
    )


def _kernel_gradient(x, dy, _, shape):
    return _call(
        "kernel_gradient",
        (*shape.window, shape.group_inputs, shape.out_channels),
        (x, dy),
        stride=shape.stride,
        padding=shape.padding,
        groups=shape.groups,
    )


def _sparse_convolve(x, values, edges, shape):
    return _call(
        "sparse_convolve",
        (shape.images, *shape.out_size, shape.out_channels),
        (x, values, edges),
        padding=shape.padding,
        transposed=0,
    )


def _sparse_input_gradient(dy, values, edges, shape):
    return _call(
        "sparse_convolve",
        (shape.images, *shape.size, shape.in_channels),
        (dy, values, edges),
        padding=shape.window[0] - 1 - shape.padding,
        transposed=1,
    )


def _values_gradient(x, dy, edges, shape):
    size = (*shape.window, edges.shape[0])
    return _call("values_gradient", size, (x, dy, edges), padding=shape.padding)


def _call(name: str, size: tuple[int, ...], arrays: tuple, **attributes) -> jax.Array:
    """Calls a kernel in float32; the result has the dtype of the first array."""
    a, b, *edges = arrays
    floats = (x.astype(jnp.float32) for x in (a, b))
    attributes = {k: np.int64(v) for k, v in attributes.items()}
    return _kernel(name, size)(*floats, *edges, **attributes).astype(a.dtype)


def _kernel(name: str, *sizes: tuple[int, ...]) -> Callable:
    """Returns a function that calls a kernel. sizes: of each of its results."""
    results = [jax.ShapeDtypeStruct(size, jnp.float32) for size in sizes]
    results = results if len(results) > 1 else results[0]
    # "sequential": jax.vmap becomes a loop.
    return jax.ffi.ffi_call(build.load() + name, results, vmap_method="sequential")


_convolution = _differentiable(_convolve, _input_gradient, _kernel_gradient)
_sparse = _differentiable(_sparse_convolve, _sparse_input_gradient, _values_gradient)

"""The C++ kernels compute XLA's convolutions, with all derivatives, or are not used."""

import functools
import os
import pathlib
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from nets.layers.cpu import build, calls
from nets.layers.cross_layer import CrossLayer, make_source, unstack_scales
from nets.layers.expander import ExpanderConv
from nets.layers.interleaved import SecondaryConv, mix_literally
from nets.layers.lowerings import Shape, convolution, native
from nets.layers.norm import BatchNorm
from tests.support import compiling

CHECKOUT = pathlib.Path(__file__).parents[2]
SPEC = jax.sharding.PartitionSpec


@pytest.fixture
def kernels(request):
    """Loads the kernels for one test; skips without a C++ compiler.

    request.param: the compiler, if not the first one found, and additional flags.
    """
    compiler = os.environ.pop("CXX")
    chosen, *flags = getattr(request, "param", [""])
    build.reset()
    try:
        if chosen:
            if shutil.which(chosen) is None:
                pytest.skip(f"{chosen} is not installed")
            os.environ["CXX"] = chosen
            assert build.load(tuple(flags)), "the build failed"
        elif build.load() is None:
            pytest.skip("the C++ kernels could not be compiled here")
        yield
    finally:
        os.environ["CXX"] = compiler
        build.reset()


def normal(shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def shape_of(images, size, inputs, outputs, window, stride=1, padding=0, groups=1):
    """Returns the Shape of a convolution, and those of its arrays."""
    x, kernel = (images, *size, inputs), (window, window, inputs // groups, outputs)
    arrays = (jax.ShapeDtypeStruct(s, jnp.float32) for s in (x, kernel))
    return Shape.of(*arrays, stride, padding, groups), x, kernel


def with_gradients(convolve, x, weights):
    """Returns y, dx and dweights."""

    @compiling.run_once
    def compute(x, weights):
        y, transpose = jax.vjp(convolve, x, weights)
        return y, *transpose(normal(y.shape, seed=2, dtype=y.dtype))

    return compute(x, weights)


def assert_equal(found, expected):
    for a, b in zip(found, expected, strict=True):
        scale = np.abs(b).max(initial=1e-9)
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * scale)


def compare(shape, x_shape, kernel_shape):
    x, kernel = normal(x_shape), normal(kernel_shape, seed=1)
    found = with_gradients(lambda x, k: calls.convolution(x, k, shape), x, kernel)
    assert_equal(found, with_gradients(lambda x, k: native(x, k, shape), x, kernel))


def graph(inputs, outputs, degree, seed=0):
    rng = np.random.default_rng(seed)
    pairs = np.concatenate(
        [
            rng.choice(inputs, degree, replace=False) * outputs + o
            for o in range(outputs)
        ]
    )
    return jnp.asarray(np.sort(pairs), jnp.int32)


def dense(values, edges, inputs, outputs):
    flat = jnp.zeros((*values.shape[:2], inputs * outputs))
    flat = flat.at[..., edges].set(values)
    return flat.reshape(*values.shape[:2], inputs, outputs)


def compare_sparse(shape, x_shape, degree):
    edges = graph(shape.in_channels, shape.out_channels, degree)
    x, values = normal(x_shape), normal((*shape.window, len(edges)), seed=1)
    found = with_gradients(
        lambda x, v: calls.sparse_convolution(x, v, edges, shape), x, values
    )
    kernel = functools.partial(
        dense, edges=edges, inputs=shape.in_channels, outputs=shape.out_channels
    )
    expected = with_gradients(lambda x, v: native(x, kernel(v), shape), x, values)
    assert_equal(found, expected)


CASES = {
    "stem": (2, (6, 7), 3, 16, 3, 1, 1),
    "several panels and tiles": (2, (5, 27), 20, 70, 3, 1, 1),
    "strided": (3, (9, 8), 16, 24, 3, 2, 1),
    "wide groups": (2, (6, 6), 48, 36, 3, 1, 1, 2),
    "depthwise": (2, (6, 7), 36, 36, 3, 1, 1, 36),
    "pairs, strided": (2, (9, 8), 40, 40, 3, 2, 1, 20),
    "groups of 4": (2, (5, 17), 36, 36, 3, 1, 1, 9),
    "groups of 8": (2, (6, 7), 24, 24, 3, 1, 1, 3),
    "no images": (0, (6, 7), 8, 8, 3, 1, 1),
    "1x1 map": (3, (1, 1), 8, 8, 3, 1, 1, 4),
    "padded beyond the window": (2, (4, 5), 4, 4, 3, 1, 4),
}
SPARSE = {
    "1x1": (3, (9, 8), 40, 24, 1),
    "1x1 of 1x1 maps": (5, (1, 1), 16, 8, 1),
    "3x3": (2, (9, 8), 24, 20, 3, 1, 1),
    "3x3, several strips": (1, (20, 33), 8, 8, 3, 1, 1),
    "no images": (0, (4, 4), 8, 8, 3, 1, 1),
}


@pytest.mark.parametrize("case", CASES)
def test_convolutions_and_gradients_are_xlas(kernels, case):
    compare(*shape_of(*CASES[case]))


@pytest.mark.parametrize("case", SPARSE)
def test_sparse_convolutions_and_gradients_are_those_of_the_dense_kernel(kernels, case):
    shape, x, _ = shape_of(*SPARSE[case])
    compare_sparse(shape, x, degree=3)


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of x86-64")
@pytest.mark.parametrize(
    "kernels", [("g++", "-mno-avx512f"), ("clang++",)], ids=" ".join, indirect=True
)
def test_other_instructions_and_compilers(kernels):
    for case in CASES.values():
        compare(*shape_of(*case))
    for case in SPARSE.values():
        shape, x, _ = shape_of(*case)
        compare_sparse(shape, x, degree=3)


def compare_rounded(found, expected, x, weights):
    """Compares with `expected`, which computes in float32 and rounds its results."""

    def rounded(x, weights):
        y = expected(x.astype(jnp.float32), weights.astype(jnp.float32))
        return y.astype(jnp.bfloat16)

    found, expected = (with_gradients(f, x, weights) for f in (found, rounded))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == jnp.bfloat16
        a, b = (z.astype(jnp.float32) for z in (a, b))
        # Values at the edge between two bfloat16 numbers may round to either.
        np.testing.assert_allclose(a, b, rtol=2**-7, atol=2e-5 * np.abs(b).max())


@pytest.mark.parametrize("case", ["strided", "groups of 4"])
def test_bfloat16_convolutions_are_rounded_float32_convolutions(kernels, case):
    shape, *arrays = shape_of(*CASES[case])
    x, kernel = (normal(s, i, jnp.bfloat16) for i, s in enumerate(arrays))
    compare_rounded(
        lambda x, k: calls.convolution(x, k, shape),
        lambda x, k: native(x, k, shape),
        *(x, kernel),
    )


def test_bfloat16_sparse_convolutions_are_rounded_float32_convolutions(kernels):
    shape, x, _ = shape_of(*SPARSE["3x3"])
    edges = graph(shape.in_channels, shape.out_channels, degree=3)
    sizes = shape.in_channels, shape.out_channels
    x, values = (
        normal(s, i, jnp.bfloat16) for i, s in enumerate((x, (3, 3, len(edges))))
    )
    compare_rounded(
        lambda x, v: calls.sparse_convolution(x, v, edges, shape),
        lambda x, v: native(x, dense(v, edges, *sizes), shape),
        *(x, values),
    )


@pytest.mark.slow
def test_random_convolutions(kernels):
    sizes = st.tuples(st.integers(1, 20), st.integers(1, 20))

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(
        *(st.integers(0, 3), sizes, st.integers(1, 40), st.integers(1, 70)),
        *(st.integers(1, 4), st.integers(1, 3), st.integers(0, 3)),
        st.sampled_from([(1, 1), (1, 1), (2, 3), (4, 1), (9, 1)]),
    )
    def check(images, size, i, o, window, stride, padding, groups):
        groups, share = groups
        i, o = (i, o) if groups == 1 else (groups * (i % 9 + 1), groups * (o % 9 + 1))
        if groups > 1 and share == 1:
            o = i
        if min(size) + 2 * padding >= window:
            compare(*shape_of(images, size, i, o, window, stride, padding, groups))

    check()


@pytest.mark.slow
def test_random_sparse_convolutions(kernels):
    sizes = st.tuples(st.integers(1, 24), st.integers(1, 40))

    @settings(max_examples=80, deadline=None, derandomize=True)
    @given(
        *(st.integers(0, 3), sizes, st.integers(1, 40), st.integers(1, 40)),
        *(st.integers(1, 3), st.integers(0, 2), st.integers(1, 40)),
    )
    def check(images, size, i, o, window, padding, degree):
        padding %= window
        if min(size) + 2 * padding >= window:
            shape, x, _ = shape_of(images, size, i, o, window, 1, padding)
            compare_sparse(shape, x, min(degree, i))

    check()


def test_second_derivatives_and_vmap(kernels):
    shape, x_shape, kernel_shape = shape_of(2, (5, 4), 4, 4, 3, 2, 1, 2)
    x, kernel = normal((3, *x_shape)), normal(kernel_shape, seed=1)

    def curvature(convolve):
        loss = lambda x, kernel: jnp.sum(jnp.sin(convolve(x, kernel, shape)))
        slope = lambda *args: sum(jnp.sum(g**2) for g in jax.grad(loss, (0, 1))(*args))
        return compiling.run_once(jax.vmap(jax.grad(slope, (0, 1)), (0, None)))

    found, expected = (curvature(f)(x, kernel) for f in (calls.convolution, native))
    assert_equal(found, expected)


def test_second_derivatives_of_a_sparse_convolution(kernels):
    shape, x_shape, _ = shape_of(2, (4, 5), 6, 4, 3, 1, 1)
    edges = graph(6, 4, 2)
    x, values = normal(x_shape), normal((3, 3, 8), seed=1)

    def curvature(convolve):
        loss = lambda x, values: jnp.sum(jnp.sin(convolve(x, values)))
        slope = lambda *args: sum(jnp.sum(g**2) for g in jax.grad(loss, (0, 1))(*args))
        return compiling.run_once(jax.grad(slope, (0, 1)))(x, values)

    found = curvature(lambda x, v: calls.sparse_convolution(x, v, edges, shape))
    expected = curvature(lambda x, v: native(x, dense(v, edges, 6, 4), shape))
    assert_equal(found, expected)


class Mixing(nnx.Module):
    """Two cross-layer convolutions of the same sources, with weights that differ."""

    def __init__(self, channels, counts):
        options = dict(channels=channels, affine=False)
        self.norms = nnx.List([BatchNorm(**options) for _ in range(max(counts))])
        self.readers = nnx.List([CrossLayer(channels, count) for count in counts])
        for i, reader in enumerate(self.readers):
            reader.scale[...] = normal(reader.scale.shape, seed=i)
            reader.bias[...] = normal(reader.bias.shape, seed=i + 2)

    def __call__(self, maps):
        pairs = enumerate(zip(maps, self.norms, strict=True))
        sources = [
            make_source(x, norm, i, unstack_scales(self.readers))
            for i, (x, norm) in pairs
        ]
        return [reader(sources[: len(reader.scale)]) for reader in self.readers]


@pytest.mark.parametrize(
    ("size", "groups", "channels", "counts", "order"),
    [
        ((17, 19), 1, 36, (2, 5), 1),
        pytest.param((5, 4), 2, 20, (2, 2), 2, marks=pytest.mark.slow),
    ],
)
def test_cross_layer_convolutions_and_gradients_are_xlas(
    kernels, monkeypatch, size, groups, channels, counts, order
):
    """The first derivatives, or the second ones, too."""
    mixing = Mixing(channels, counts)
    for norm in mixing.norms:
        norm.groups = groups
    graphdef, params, rest = nnx.split(mixing, nnx.Param, ...)
    maps = [normal((4, *size, channels), seed) for seed in range(max(counts))]

    def loss(params, maps):
        mixed = nnx.merge(graphdef, params, rest, copy=True)(maps)
        return sum(jnp.sum(jnp.sin(y) * (i + 1)) for i, y in enumerate(mixed))

    def slope(params, maps):
        gradients = jax.grad(loss, (0, 1))(params, maps)
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(gradients))

    def compute(calls_kernels):
        functions = [jax.value_and_grad(f, (0, 1)) for f in (loss, slope)[:order]]
        program = sharded(lambda maps, params: [f(params, maps) for f in functions], 1)
        lowered = program.lower(maps, params)
        assert (f"{build.load()}weighted_sum" in lowered.as_text()) == calls_kernels
        return jax.tree.leaves(lowered.compile(compiling.options())(maps, params))

    found = compute(True)
    monkeypatch.setattr(calls, "usable", lambda x: False)
    jax.clear_caches()
    assert_equal(found, compute(False))


@pytest.mark.parametrize(
    ("channels", "groups", "in_cpp"),
    [(32, (4, 8), True), (64, (32, 2), True), (48, (24, 2), False)],
)
def test_secondary_convolutions_compute_with_connected_pairs(
    kernels, monkeypatch, channels, groups, in_cpp
):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    primary, secondary = groups
    options = dict(primary_groups=primary, secondary_groups=secondary)
    layer = SecondaryConv(channels, **options, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(layer)
    x, kernel = normal((3, 5, 4, channels)), layer.kernel[...]

    def mix(x, kernel):
        return nnx.merge(graphdef, jax.tree.map(lambda _: kernel, state))(x)

    text = jax.jit(mix).lower(x, kernel).as_text()
    assert (f"{build.load()}sparse_convolve" in text) == in_cpp
    found = with_gradients(mix, x, kernel)
    literal = lambda x, kernel: mix_literally(x, kernel, *groups)
    assert_equal(found, with_gradients(literal, x, kernel))


BATCH_NORM_KERNELS = {"map_moments", "gradient_moments", "weighted_sum"}
SLOW = pytest.mark.slow
# Shape of the input, groups of images, and where the input is split into maps.
BATCH_NORMS = {
    "whole vectors": ((4, 17, 19, 32), 1, []),
    "an overlapping vector": ((4, 5, 3, 36), 2, []),
    "fewer channels than lanes": ((6, 4, 5, 5), 3, []),
    "no spatial axes": ((8, 10), 1, []),
    "three maps": ((4, 5, 3, 60), 2, [36, 41]),
}


def normalise(x, groups, splits, activation):
    """Returns the kernels that the program of a BatchNorm calls, and its results.

    activation: as for BatchNorm, or "unit" for a ReLU after the sum with a shortcut.
    The results are y, the running mean and variance, the gradients of x and of the
    parameters, and second-order gradients.
    """
    norm = BatchNorm(x.shape[-1])
    norm.groups = groups
    norm.scale[...] = 4 * normal(norm.scale.shape, seed=1)  # some results exceed 6
    graphdef, params, rest = nnx.split(norm, nnx.Param, ...)

    def apply(params, x):
        norm = nnx.merge(graphdef, params, rest, copy=True)
        maps = [norm.measure(part) for part in jnp.split(x, splits, axis=-1)]
        if activation == "unit":
            y = norm(maps, "relu", jnp.cos(x))
        else:
            y = norm(maps, activation)
        return jnp.sum(jnp.sin(y)), (y, norm.mean[...], norm.var[...])

    def slope(params, x):
        gradients = jax.grad(apply, (0, 1), has_aux=True)(params, x)[0]
        return sum(jnp.sum(jnp.square(each)) for each in jax.tree.leaves(gradients))

    def compute(x, params):
        (_, results), gradients = jax.value_and_grad(apply, (0, 1), has_aux=True)(
            params, x
        )
        return *results, gradients[1], gradients[0], jax.grad(slope, (0, 1))(params, x)

    lowered = sharded(compute, 1).lower(x, params)
    text, prefix = lowered.as_text(), build.load()
    called = {name for name in BATCH_NORM_KERNELS if f"{prefix}{name}" in text}
    return called, lowered.compile(compiling.options())(x, params)


@pytest.mark.parametrize(
    ("case", "activation"),
    [
        pytest.param(
            case,
            activation,
            marks=() if activation == "relu" else SLOW,
        )
        for case in BATCH_NORMS
        for activation in (None, "relu", "relu6", "unit")
    ],
)
def test_batch_norm_equals_xlas(kernels, monkeypatch, case, activation):
    shape, *options = *BATCH_NORMS[case], activation
    called, found = normalise(normal(shape), *options)
    unused = set() if activation == "unit" else {"weighted_sum"}
    assert called == BATCH_NORM_KERNELS - unused
    monkeypatch.setattr(calls, "usable", lambda x: False)
    jax.clear_caches()
    called, expected = normalise(normal(shape), *options)
    assert not called
    assert_equal(*map(jax.tree.leaves, (found, expected)))


@pytest.mark.parametrize(
    "activation",
    [pytest.param(None, marks=SLOW), "relu", pytest.param("unit", marks=SLOW)],
)
@pytest.mark.parametrize(("channels", "splits"), [(5, []), (36, []), (36, [20])])
def test_batch_norm_keeps_nan_in_its_channel(kernels, channels, splits, activation):
    shape = (2, 3, 4, channels)
    for channel in (0, channels - 1):
        x = normal(shape).at[1, 2, 3, channel].set(np.nan)
        _, results = normalise(x, 1, splits, activation)
        # Output, running statistics, gradient of x.
        for result in results[:4]:
            has_nan = np.isnan(result).reshape(-1, channels).any(0)
            np.testing.assert_array_equal(has_nan, np.arange(channels) == channel)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("groups", [1, 4])
def test_nan_and_infinity_travel_as_far_as_in_xla(kernels, value, groups):
    shape, x_shape, kernel_shape = shape_of(2, (5, 6), 8, 8, 3, 1, 1, groups)
    x, kernel = normal(x_shape).at[0, 2, 3, 1].set(value), normal(kernel_shape, seed=1)
    found = with_gradients(lambda x, k: calls.convolution(x, k, shape), x, kernel)
    expected = with_gradients(lambda x, k: native(x, k, shape), x, kernel)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(np.isfinite(a), np.isfinite(b))


@pytest.mark.parametrize(
    ("name", "result", "arrays", "attributes"),
    [
        ("convolve", (2, 4, 4, 8), [(2, 4, 4, 6), (3, 3, 5, 8)], (1, 1, 1, 1, 0)),
        ("convolve", (3, 4, 4, 8), [(2, 4, 4, 6), (3, 3, 6, 8)], (1, 1, 1, 1, 0)),
        ("convolve", (2, 4, 4, 8), [(2, 4, 4, 6), (3, 3, 6, 8)], (0, 1, 1, 1, 0)),
        ("convolve", (2, 4, 4, 8), [(2, 4, 4, 6), (3, 3, 2, 8)], (1, 1, 1, 3, 0)),
        ("convolve", (2, 4, 4, 6), [(2, 4, 4, 8), (3, 3, 5, 8)], (1, 1, 1, 1, 1)),
        ("convolve", (2, 4, 4, 6), [(2, 4, 4, 8), (3, 3, 2, 8)], (1, 1, 1, 3, 1)),
    ],
)
def test_a_call_that_does_not_fit_is_an_error(
    kernels, name, result, arrays, attributes
):
    names = ("stride", "padding", "dilation", "groups", "turn")
    result = jax.ShapeDtypeStruct(result, jnp.float32)
    call = jax.ffi.ffi_call(build.load() + name, result, vmap_method="sequential")
    values = {k: np.int64(v) for k, v in zip(names, attributes, strict=True)}
    with pytest.raises(jax.errors.JaxRuntimeError, match="arrays do not fit"):
        jax.block_until_ready(call(*map(normal, arrays), **values))


@pytest.mark.parametrize(
    ("maps", "weights", "shift"),
    [
        ([(1, 6, 4), (1, 5, 4)], (1, 2, 4), (1, 4)),
        ([(1, 6, 4), (1, 6, 4)], (1, 3, 4), (1, 4)),
        ([(1, 6, 4), (1, 6, 4)], (1, 2, 4), (1, 5)),
    ],
)
def test_a_sum_that_does_not_fit_is_an_error(kernels, maps, weights, shift):
    maps, weights, shift = list(map(normal, maps)), normal(weights), normal(shift)
    with pytest.raises(jax.errors.JaxRuntimeError, match="arrays do not fit"):
        jax.block_until_ready(calls.weighted_sum(maps, weights, shift))
    with pytest.raises(jax.errors.JaxRuntimeError, match="arrays do not fit"):
        jax.block_until_ready(
            calls.weights_gradients(normal((1, 6, shift.shape[1])), weights, maps)
        )


@pytest.mark.parametrize(
    ("name", "arrays", "result"),
    [
        ("map_moments", [(1, 6, 4), (1, 5)], (2, 1, 4)),
        ("map_moments", [(1, 6, 4), (2, 4)], (2, 1, 4)),
        ("map_moments", [(1, 6, 4), (1, 4)], (2, 2, 4)),
        ("map_moments", [(6, 4), (1, 4)], (2, 1, 4)),
        ("gradient_moments", [(1, 6, 4), (0, 1, 4), (1, 5, 4)], (2, 1, 4)),
        ("gradient_moments", [(1, 6, 4), (0, 1, 4), (1, 6, 3)], (2, 1, 4)),
        ("gradient_moments", [(1, 6, 4), (0, 1, 4), (1, 6, 3), (1, 6, 2)], (2, 1, 4)),
        ("gradient_moments", [(1, 6, 4), (0, 1, 4), (1, 6, 4)], (1, 1, 4)),
        ("gradient_moments", [(1, 6, 4), (2, 1, 3), (1, 6, 4)], (2, 1, 4)),
        ("gradient_moments", [(1, 6, 4), (1, 1, 4), (1, 6, 4)], (2, 1, 4)),
    ],
)
def test_moments_that_do_not_fit_are_an_error(kernels, name, arrays, result):
    result = jax.ShapeDtypeStruct(result, jnp.float32)
    call = jax.ffi.ffi_call(build.load() + name, result, vmap_method="sequential")
    options = {"limit": np.float32(6)} if name == "gradient_moments" else {}
    with pytest.raises(jax.errors.JaxRuntimeError, match="arrays do not fit"):
        jax.block_until_ready(call(*map(normal, arrays), **options))


@pytest.mark.parametrize("edge", [-1, 48])
def test_an_edge_outside_of_the_graph_is_an_error(kernels, edge):
    shape, x, _ = shape_of(2, (4, 5), 6, 8, 3, 1, 1)
    edges = jnp.array([3, edge], jnp.int32)
    with pytest.raises(jax.errors.JaxRuntimeError, match="arrays do not fit"):
        jax.block_until_ready(
            calls.sparse_convolution(normal(x), normal((3, 3, 2)), edges, shape)
        )
    with pytest.raises(ValueError, match="do not fit a"):
        calls.sparse_convolution(normal(x), normal((3, 3, 5)), edges, shape)


def sharded(function, count=2):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:count]), "data")
    specs = (SPEC("data"), SPEC())
    return jax.jit(
        jax.shard_map(
            lambda x, w: jax.lax.psum(function(x, w), "data"),
            mesh=mesh,
            in_specs=specs,
            out_specs=SPEC(),
            check_vma=False,
        )
    )


def test_a_sharded_step_calls_the_kernels_and_gathers_nothing(kernels):
    x, kernel = normal((4, 6, 6, 8)), normal((3, 3, 2, 8), seed=1)
    convolve = functools.partial(convolution, padding=1, groups=4)
    loss = lambda kernel, x: jnp.sum(convolve(x, kernel) ** 2)
    step = sharded(lambda x, kernel: jax.grad(loss)(kernel, x)).lower(x, kernel)
    compiled = step.compile()
    assert build.load() in compiled.as_text()
    assert compiling.collectives(compiled).keys() == {"all-reduce"}
    # Without a shard_map, XLA would gather the batch for a call.
    assert "wirings" not in jax.jit(loss).lower(kernel, x).as_text()
    expected = jax.grad(loss)(kernel, x)
    np.testing.assert_allclose(compiled(x, kernel), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("degree", [6, 4])
def test_only_sparse_expanders_compute_with_edges(kernels, degree):
    layer = ExpanderConv(
        8, 8, 1, degree=degree, sampling="per_output", rngs=nnx.Rngs(params=0)
    )
    layer.draw(np.random.default_rng(0))
    graphdef, state = nnx.split(layer)
    program = sharded(lambda x, state: nnx.merge(graphdef, state)(x))
    traced = program.trace(normal((4, 3, 3, 8)), state)
    assert ("sparse_convolve" in traced.lower().as_text()) == (degree == 4)
    assert "name=convolution" in str(traced.jaxpr)  # config.net.remat looks for it


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float64])
@pytest.mark.parametrize("lowering", ["auto", "cpp"])
def test_bfloat16_uses_the_kernels_and_float64_other_lowerings(
    kernels, lowering, dtype
):
    with jax.enable_x64(True):
        x, kernel = (normal(s, dtype=dtype) for s in ((4, 6, 6, 8), (3, 3, 8, 8)))
        step = sharded(lambda x, kernel: convolution(x, kernel, lowering=lowering))
        used = "wirings" in step.lower(x, kernel).as_text()
        assert used == (dtype == jnp.bfloat16)


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """A compiler that runs a shell script, and an empty cache."""
    path = tmp_path / "compiler"

    def install(script):
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        build.reset()

    monkeypatch.setenv("CXX", str(path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield install
    build.reset()


BUILDS = 'case "$*" in *-E*) echo {};; *) for o; do :; done; echo {} > "$o";; esac'
NONE = "no C++ kernels, convolutions are slower on CPU: "


def load_logged(caplog) -> list[str]:
    """Loads twice, which fails, and computes; returns all log messages."""
    with caplog.at_level("INFO", logger=logging.get_absl_logger().name):
        assert build.load() is None
        assert build.load() is None
        x, kernel = normal((1, 4, 4, 3)), normal((3, 3, 3, 2), seed=1)
        assert convolution(x, kernel).shape == (1, 2, 2, 2)
    return [record.message for record in caplog.records]


def test_a_compiler_may_have_arguments(compiler, monkeypatch):
    compiler("exit 1")
    path = os.environ["CXX"]
    monkeypatch.setenv("CXX", f"{path} g++")
    assert build.find_compiler() == [path, "g++"]


def test_a_command_with_an_open_quotation_mark_is_no_compiler(monkeypatch, caplog):
    monkeypatch.setenv("CXX", "g++ '")
    build.reset()
    messages = load_logged(caplog)
    build.reset()
    assert messages == [f"{NONE}No closing quotation"]


def test_without_a_compiler_one_line_says_so(monkeypatch, caplog):
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    build.reset()
    messages = load_logged(caplog)
    build.reset()
    assert messages == [f"{NONE}no C++ compiler found (c++, g++, clang++)"]


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of x86-64")
def test_without_avx_one_line_says_so(compiler, caplog):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    compiler('exec g++ "$@" -march=x86-64')
    (message,) = load_logged(caplog)
    assert message.startswith(NONE)
    assert "the kernels need AVX" in message


def test_a_failing_build_leaves_nothing_behind(compiler, tmp_path, caplog):
    compiler('for out; do :; done; echo x > "$out"; echo "no space" >&2; exit 1')
    assert load_logged(caplog) == [f"{NONE}no space"]
    assert not list(tmp_path.glob("cache/wirings/*"))


def test_a_program_that_is_no_compiler_is_named(compiler, tmp_path, caplog):
    compiler("exit 0")
    name = tmp_path / "compiler"
    assert load_logged(caplog) == [
        f"{NONE}{name} wrote no library: is it a C++ compiler?"
    ]
    assert not list(tmp_path.glob("cache/wirings/*"))


def test_a_cache_that_cannot_be_written_is_named(compiler, tmp_path, caplog):
    (tmp_path / "cache").write_text("a file, not a directory")
    compiler(BUILDS.format(1, "library"))
    (message,) = load_logged(caplog)
    assert message.startswith(f"{NONE}[Errno ")
    assert str(tmp_path / "cache") in message


def test_a_library_is_built_once_per_compiler(compiler, tmp_path):
    compiler(BUILDS.format(1, "first"))
    library = build.build()
    compiler(BUILDS.format(1, "again"))
    assert build.build() == library
    assert library.read_bytes().startswith(b"first\n")
    compiler(BUILDS.format(2, "new"))
    assert build.build() != library
    assert len(list((tmp_path / "cache/wirings").iterdir())) == 2


def test_a_truncated_library_is_built_anew(compiler):
    compiler(BUILDS.format(1, "library"))
    library = build.build()
    whole = library.read_bytes()
    for size in (0, 3, len(whole) - 1):
        library.write_bytes(whole[:size])
        assert build.build() == library
        assert library.read_bytes() == whole


@pytest.fixture
def start_builds(compiler, tmp_path):
    """Returns count -> processes that build, once all their compilers have started.

    The compilers write no library before `finish` exists in tmp_path.
    """
    compiler(
        f'case "$*" in *-E*) echo 1; exit;; esac; touch "{tmp_path}/started-$$"; '
        f'until [ -e "{tmp_path}/finish" ]; do sleep 0.01; done; '
        'for o; do :; done; echo library > "$o"'
    )
    command = "from nets.layers.cpu import build; print(build.build())"
    options = dict(
        cwd=CHECKOUT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )

    def start(count):
        processes = [
            subprocess.Popen([sys.executable, "-c", command], **options)
            for _ in range(count)
        ]
        while len(list(tmp_path.glob("started-*"))) < count:
            assert all(process.poll() is None for process in processes)
            time.sleep(0.01)
        return processes

    return start


@pytest.mark.slow
def test_processes_that_build_at_the_same_time_share_one_library(
    start_builds, tmp_path
):
    processes = start_builds(2)
    (tmp_path / "finish").touch()
    written = {process.communicate()[0].strip() for process in processes}
    assert written == {str(build.build())}
    assert len(list((tmp_path / "cache/wirings").iterdir())) == 1


def test_a_killed_build_does_not_matter(start_builds, tmp_path):
    (process,) = start_builds(1)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    (draft,) = (tmp_path / "cache/wirings").iterdir()
    (tmp_path / "finish").touch()
    library = build.build()
    assert library.read_bytes().startswith(b"library\n")
    assert draft.exists()  # perhaps of a process that is still building
    os.utime(draft, (0, 0))
    library.unlink()
    assert build.build() == library
    assert list(library.parent.iterdir()) == [library]


def test_a_library_that_cannot_be_loaded_is_not_used(compiler, caplog):
    compiler(BUILDS.format(1, "x"))
    compiled, message = load_logged(caplog)
    assert compiled.startswith("compiled C++ kernels")
    assert message.startswith(NONE)


def test_calls_from_many_threads_finish(kernels):
    """Branches of a program and several programs at a time share XLA's threads."""
    shape, x_shape, kernel_shape = shape_of(2, (6, 6), 8, 8, 3, 1, 1)
    x = normal(x_shape)
    weights = [normal(kernel_shape, seed) for seed in range(8)]

    def loss(weights):
        convolve = lambda x, kernel: calls.convolution(x, kernel, shape)
        return sum(jnp.sum(convolve(convolve(x, w), w) ** 2) for w in weights)

    gradient = jax.jit(jax.grad(loss))
    expected = gradient(weights)
    results = []

    def run():
        for _ in range(20):
            results.append(jax.block_until_ready(gradient(weights)))

    threads = [threading.Thread(target=run, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
    for result in results:
        for a, b in zip(result, expected, strict=True):
            np.testing.assert_array_equal(a, b)


SCRIPT = """
import hashlib, os, sys
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(sys.argv[1])])
import jax, numpy as np
from nets.layers.cpu import build, calls
from nets.layers.lowerings import Shape
if len(sys.argv) > 2:
    assert build.load(("-O0", *sys.argv[2:]))
rng, digest = np.random.default_rng(0), hashlib.sha256()
normal = lambda shape: np.asarray(rng.standard_normal(shape), np.float32)
for channels, groups, stride in [(24, 1, 1), (24, 1, 2), (40, 20, 1), (24, 3, 1)]:
    x, k = normal((7, 9, 10, channels)), normal((3, 3, channels // groups, channels))
    shape = Shape.of(x, k, stride, 1, groups)
    y, transpose = jax.vjp(lambda x, k: calls.convolution(x, k, shape), x, k)
    for result in (y, *transpose(y)):
        digest.update(np.asarray(result).tobytes())
edges = np.arange(0, 24 * 24, 5, dtype=np.int32)
for window in (1, 3):
    x, v = normal((7, 9, 10, 24)), normal((window, window, len(edges)))
    shape = Shape.of(x, np.zeros((window, window, 24, 24)), 1, window // 2, 1)
    sparse = lambda x, v: calls.sparse_convolution(x, v, edges, shape)
    y, transpose = jax.vjp(sparse, x, v)
    for result in (y, *transpose(y)):
        digest.update(np.asarray(result).tobytes())
maps, weights, shift = normal((3, 2, 45, 20)), normal((2, 3, 20)), normal((2, 20))
for result in (
    calls.weighted_sum([*maps], weights, shift),
    *calls.weights_gradients(maps[0], weights, [*maps]),
):
    digest.update(np.asarray(result).tobytes())
# Parts of a single row of 8 floats: the last vector of the last but one ends after dy.
x, k = normal((1, 8, 8, 2000)), normal((3, 3, 2000, 1))
shape = Shape.of(x, k, 1, 1, 1)
dk = jax.vjp(lambda k: calls.convolution(x, k, shape), k)[1](normal((1, 8, 8, 1)))
digest.update(np.asarray(dk[0]).tobytes())
for channels in (5, 16, 20):
    x, dy = normal((2, 3, 700, channels))
    maps = [x[..., :3], x[..., 3:]]
    for result in (calls.map_moments(x, x[:, 0]), calls.gradient_moments(maps, dy)):
        digest.update(np.asarray(result).tobytes())
print(digest.hexdigest())
"""


def run_script(*arguments, **variables) -> str:
    env = {k: v for k, v in os.environ.items() if k not in ("CXX", "XLA_FLAGS")}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        cwd=CHECKOUT,
        env=env | variables,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


@pytest.mark.slow
def test_results_do_not_depend_on_the_number_of_threads(kernels):
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core")
    assert run_script("1") == run_script("2")


@pytest.mark.slow
def test_address_and_undefined_behaviour_sanitizers_find_nothing(kernels, tmp_path):
    # The C++ runtime, too, because the sanitizer looks for its functions at the start.
    runtimes = []
    for name in ("libasan.so", "libstdc++.so"):
        command = [*build.find_compiler(), f"-print-file-name={name}"]
        find = subprocess.run(command, capture_output=True, text=True, check=True)
        runtimes.append(find.stdout.strip())
    if not all(map(os.path.isabs, runtimes)):
        pytest.skip("the compiler has no address sanitizer")
    flags = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    run_script(
        "2",
        *flags,
        LD_PRELOAD=" ".join(runtimes),
        ASAN_OPTIONS="detect_leaks=0",
        XDG_CACHE_HOME=str(tmp_path),
    )

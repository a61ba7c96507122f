"""All lowerings compute the same function: outputs and both gradients agree."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nets.layers import lowerings
from nets.layers.lowerings import LOWERINGS, Shape, choose, convolution

# images, size, in, out, window, stride, padding, groups
CASES = {
    "3x3": (2, 6, 8, 8, 3, 1, 1, 1),
    "3x3 of 32": (2, 5, 32, 32, 3, 1, 1, 1),
    "3x3 narrows": (2, 6, 12, 4, 3, 1, 1, 1),
    "3x3 widens": (2, 6, 4, 12, 3, 1, 1, 1),
    "3x3 stem": (2, 6, 3, 8, 3, 1, 1, 1),
    "3x3 strided": (2, 8, 8, 12, 3, 2, 1, 1),
    "3x3 strided, odd": (2, 7, 8, 12, 3, 2, 1, 1),
    "3x3 unpadded": (2, 6, 8, 8, 3, 1, 0, 1),
    "3x3 padded beyond the window": (2, 5, 8, 8, 3, 1, 4, 1),
    "2x2 strided": (2, 6, 4, 4, 2, 2, 0, 1),
    "5x5": (2, 6, 4, 6, 5, 1, 2, 1),
    "7x7 strided": (2, 12, 3, 8, 7, 2, 3, 1),
    "1x1": (2, 5, 6, 10, 1, 1, 0, 1),
    "1x1 strided": (2, 7, 6, 10, 1, 2, 0, 1),
    "1x1 padded": (2, 5, 6, 10, 1, 1, 1, 1),
    "1x1 grouped": (2, 5, 6, 9, 1, 1, 0, 3),
    "3x3 grouped": (2, 6, 8, 12, 3, 1, 1, 4),
    "3x3 grouped, strided": (2, 7, 8, 12, 3, 2, 1, 2),
    "3x3 depthwise": (2, 6, 8, 8, 3, 1, 1, 8),
    "3x3 depthwise, doubling, strided": (2, 7, 6, 12, 3, 2, 1, 6),
    "3x3 pairs": (2, 6, 8, 8, 3, 1, 1, 4),
    "3x3 many pairs": (2, 4, 130, 130, 3, 1, 1, 65),
    "3x3 several blocks": (2, 4, 160, 80, 3, 1, 1, 20),
    "1x1 wide groups": (2, 4, 128, 64, 1, 1, 0, 4),
}


def sizes(case, images=None):
    n, size, i, o, k, stride, padding, groups = CASES[case]
    x, kernel = (images or n, size, size, i), (k, k, i // groups, o)
    return x, kernel, dict(stride=stride, padding=padding, groups=groups)


def shape_of(case, images=None) -> Shape:
    x, kernel, options = sizes(case, images)
    x, kernel = (jax.ShapeDtypeStruct(s, jnp.float32) for s in (x, kernel))
    return Shape.of(x, kernel, **options)


PAIRS = [
    (case, lowering)
    for case in CASES
    for lowering in lowerings.applicable(shape_of(case))
    if lowering not in ("native", "cpp")  # cpp: tests/nets/cpu_kernels_test.py
]


def outcome(case, lowering, images=None, dtype=np.float64):
    """Returns y, dx and dkernel for random numbers, the same for every lowering."""
    x_shape, kernel_shape, options = sizes(case, images)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal(x_shape), dtype)
    kernel = jnp.asarray(rng.standard_normal(kernel_shape), dtype)

    def compute(x, kernel):
        convolve = functools.partial(convolution, lowering=lowering, **options)
        y, transpose = jax.vjp(convolve, x, kernel)
        dy = jnp.asarray(np.random.default_rng(1).standard_normal(y.shape), dtype)
        return y, *transpose(dy)

    return jax.jit(compute)(x, kernel)


@functools.cache
def native(case, images=None, dtype=np.float64):
    """Returns the outcome of XLA's own convolution, computed once."""
    return outcome(case, "native", images, dtype)


def assert_equal(case, lowering, images=None):
    with jax.enable_x64(True):
        found, expected = outcome(case, lowering, images), native(case, images)
        for name, a, b in zip(("y", "dx", "dkernel"), found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11, err_msg=name)


@pytest.mark.parametrize(("case", "lowering"), PAIRS)
def test_lowerings_agree(case, lowering):
    assert_equal(case, lowering)


@pytest.fixture
def set_rows(monkeypatch):
    """Sets CHUNK_ROWS or PIECE_ROWS for one test.

    Clears JAX's caches, because traced functions contain the old number.
    """

    def set_to(name, rows):
        monkeypatch.setattr(lowerings, name, rows)
        jax.clear_caches()

    yield set_to
    jax.clear_caches()


@pytest.mark.parametrize("images", [1, 6, 7, 13])
@pytest.mark.parametrize("lowering", ["shifted", "scattered"])
def test_chunks_add_up_for_every_batch_size(set_rows, lowering, images):
    set_rows("CHUNK_ROWS", 3 * 6 * 6)  # at most 3 images
    assert_equal("3x3 narrows", lowering, images)


@pytest.mark.parametrize("images", [1, 6, 7, 13])
def test_pieces_of_a_batch_may_differ_in_size(set_rows, images):
    set_rows("PIECE_ROWS", 2 * 6 * 6)
    assert_equal("3x3", "separated", images)


@pytest.mark.parametrize("case", CASES)
def test_auto_on_cpu_is_applicable(case):
    shape = shape_of(case)
    assert choose(shape, "cpu") in lowerings.applicable(shape)
    assert choose(shape, "gpu") == choose(shape, "tpu") == "native"
    assert_equal(case, "auto")


def test_every_lowering_is_tested_and_native_replaces_one_that_does_not_apply():
    assert {lowering for _, lowering in PAIRS} == set(LOWERINGS) - {"native", "cpp"}
    assert_equal("3x3 strided", "dot")


@pytest.mark.slow
@pytest.mark.parametrize(("case", "lowering"), PAIRS)
def test_bfloat16_is_close_and_has_its_dtype(case, lowering):
    found = outcome(case, lowering, dtype=jnp.bfloat16)
    exact = native(case, dtype=np.float32)
    for a, b in zip(found, exact, strict=True):
        assert a.dtype == jnp.bfloat16
        error = jnp.abs(a.astype(jnp.float32) - b).max() / jnp.abs(b).max()
        assert error < 0.03


def test_auto_on_cpu_selects_every_lowering_for_some_shape():
    chosen = {choose(shape_of(case), "cpu") for case in CASES}
    assert chosen == set(LOWERINGS) - {"cpp", "einsum"}  # einsum is for accelerators


@pytest.mark.parametrize(
    ("case", "chosen"),
    [
        ("1x1", "dot"),
        ("1x1 grouped", "cpp"),
        ("1x1 wide groups", "cpp"),
        ("3x3", "cpp"),
        ("3x3 several blocks", "cpp"),
    ],
)
def test_auto_with_kernels_leaves_one_matrix_product_to_xla(case, chosen):
    assert choose(shape_of(case), "cpu", cpp=True) == chosen


@pytest.mark.parametrize("case", ["3x3", "3x3 narrows", "3x3 strided", "3x3 pairs"])
def test_second_derivatives_agree(case):
    """Reverse over reverse, as for Hessian-vector products."""
    x_shape, kernel_shape, options = sizes(case)
    rng = np.random.default_rng(0)

    def curvature(lowering):
        convolve = functools.partial(convolution, lowering=lowering, **options)
        loss = lambda x, kernel: jnp.sum(jnp.sin(convolve(x, kernel)))
        slope = lambda *args: sum(jnp.sum(g**2) for g in jax.grad(loss, (0, 1))(*args))
        return jax.jit(jax.grad(slope, (0, 1)))

    with jax.enable_x64(True):
        args = [jnp.asarray(rng.standard_normal(s)) for s in (x_shape, kernel_shape)]
        for a, b in zip(
            curvature("auto")(*args), curvature("native")(*args), strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", ["3x3 narrows", "3x3 strided", "3x3 pairs"])
def test_works_inside_a_loop_of_a_sharded_step(set_rows, case):
    """As in a train step: two devices, chunks within a fori_loop."""
    set_rows("CHUNK_ROWS", 64)
    x_shape, kernel_shape, options = sizes(case, images=8)
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.standard_normal(s)) for s in (x_shape, kernel_shape))
    loss = lambda kernel, x: jnp.sum(convolution(x, kernel, **options) ** 2)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), "data")

    def gradient(kernel, x):
        add = lambda _, total: total + jax.grad(loss)(kernel, x)
        return jax.lax.psum(jax.lax.fori_loop(0, 3, add, 0 * kernel), "data")

    spec = jax.sharding.PartitionSpec
    sharded = jax.shard_map(
        gradient,
        mesh=mesh,
        in_specs=(spec(), spec("data")),
        out_specs=spec(),
        check_vma=False,
    )
    expected = 3 * jax.grad(loss)(kernel, x)
    np.testing.assert_allclose(
        jax.jit(sharded)(kernel, x), expected, rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize(
    ("x", "kernel", "options", "message"),
    [
        ((1, 4, 4, 6), (3, 3, 5, 8), {}, "5 inputs in each of 1 groups.*5.*got 6"),
        ((1, 4, 4, 6), (3, 3, 2, 8), {"groups": 3}, "3 groups do not divide 8 output"),
        ((1, 4, 4, 7), (3, 3, 2, 8), {"groups": 2}, "2 groups do not divide 7 input"),
        ((1, 2, 2, 6), (5, 5, 6, 8), {"padding": 1}, r"\[?\(?2, 2.*padding 1.*5, 5"),
        ((1, 4, 4, 6), (3, 3, 6, 8), {"lowering": "shift"}, "unknown.*shift.*native"),
    ],
)
def test_shapes_that_do_not_fit_are_rejected(x, kernel, options, message):
    with pytest.raises(ValueError, match=message):
        convolution(jnp.zeros(x), jnp.zeros(kernel), **options)

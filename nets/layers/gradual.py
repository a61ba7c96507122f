"""Gradual updates: groups of channels renewed one after another (GUNN).

The groups ("segments") run in a scan over stacked parameters, forward and backward, and
the backward one computes each unit again. Beside an unrolled loop with the derivative
of JAX, on two busy CPU cores, the five layers of benchmarks/gradual.py compile 3 to 22
times faster, in 3 to 12 percent of the memory, at 0.5 to 1.1 times its time a step.
"""

import functools
from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

Order = Literal["gradual", "simultaneous"]


class Gradual(nnx.Module):
    """x (N, H, W, C) -> y of the same shape: y[segment i] = x[segment i] + unit_i(s).

    The state s holds segments 0..i-1 new and i..n-1 old, so that unit i sees its own
    segment old; in the simultaneous order every unit reads x. Segments are contiguous
    and of equal width C / n.

    unit: makes one unit, C -> C / n channels, from its rngs. `units` is one module of
      that form whose variables have a leading axis, the segment. Units may hold batch
      statistics and connections; no random streams (dropout).
    """

    def __init__(
        self,
        channels: int,
        segments: int,
        unit: Callable[[nnx.Rngs], nnx.Module],
        *,
        order: Order = "gradual",
        rngs: nnx.Rngs,
    ):
        _width(channels, segments)
        if order not in get_args(Order):
            raise ValueError(f"unknown order {order!r}: choose from {get_args(Order)}")
        # One program for all segments: n times the initialisers would compile n times
        # as long.
        build = lambda key: unit(nnx.Rngs(key))
        keys = jax.random.split(rngs.params(), segments)
        graphdef = nnx.graphdef(nnx.eval_shape(build, keys[0]))
        state = jax.vmap(lambda key: nnx.state(build(key)))(keys)
        self.units = nnx.merge(graphdef, state)
        self.channels, self.segments, self.order = channels, segments, order

    def __call__(self, x: jax.Array) -> jax.Array:
        if x.shape[-1] != self.channels:
            raise ValueError(f"{self.channels} channels expected, got {x.shape[-1]}")
        _record_nothing(self.units)
        graphdef, params, constants = nnx.split(self.units, nnx.Param, ...)

        def unit(params, constants, x):
            unit = nnx.merge(graphdef, params, constants, copy=True)
            return unit(x), nnx.state(unit, nnx.BatchStat)

        y, statistics = _sweep(unit, self.order, params, constants, x)
        nnx.update(self.units, statistics)
        return y

    def abstract_unit(self) -> nnx.Module:
        """One unit, shapes only."""
        graphdef, state = nnx.split(self.units)
        one = lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
        return nnx.merge(graphdef, jax.tree.map(one, state))


def unstacked(units: nnx.Module) -> list[nnx.Module]:
    """The units of a `Gradual`, one module per segment; variables are numpy copies."""
    graphdef, state = nnx.split(units)
    state = jax.tree.map(np.asarray, state)
    count = len(jax.tree.leaves(state)[0])
    return [
        nnx.merge(graphdef, jax.tree.map(lambda x, i=i: x[i], state))
        for i in range(count)
    ]


def _record_nothing(units: nnx.Module) -> None:
    """Under nnx.capture: values of a loop cannot leave it."""
    for _, module in nnx.iter_modules(units):
        if hasattr(module, "__captures__"):
            module.__captures__ = ()


def _width(channels: int, segments: int) -> int:
    if segments < 1 or channels % segments:
        raise ValueError(f"{segments} segments do not divide {channels} channels")
    return channels // segments


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sweep(unit: Callable, order: Order, params, constants, x: jax.Array):
    """(y, batch statistics after it); what is stacked has a leading axis n.

    unit(params, constants, state) -> (new values less old ones, statistics).
    """
    count = len(jax.tree.leaves(params)[0])
    width = _width(x.shape[-1], count)

    def update(state, inputs):
        i, params, constants = inputs
        new, statistics = unit(params, constants, _read(order, state, x))
        start = i * width
        new += lax.dynamic_slice_in_dim(x, start, width, -1)
        state = lax.dynamic_update_slice_in_dim(state, new, start, -1)
        return state, statistics

    return lax.scan(update, x, (jnp.arange(count), params, constants))


def _forward(unit, order, params, constants, x):
    y, statistics = _sweep(unit, order, params, constants, x)
    return (y, statistics), (params, constants, x, y)


def _backward(unit, order, residuals, cotangents):
    """The sweep in reverse, from x and y alone.

    Writing x's segment back over the state gives what unit i saw; it is computed
    again there, so that 2 C H W values per image are kept and not n C H W. Its batch
    statistics are dropped: they were counted in the forward sweep.
    """
    params, constants, x, y = residuals
    dy, _ = cotangents
    count = len(jax.tree.leaves(params)[0])
    width = _width(x.shape[-1], count)

    def restore(carry, inputs):
        state, dx = carry
        i, params, constants = inputs
        start = i * width
        old = lax.dynamic_slice_in_dim(x, start, width, -1)
        state = lax.dynamic_update_slice_in_dim(state, old, start, -1)
        _, pull_back = jax.vjp(
            lambda params, state: unit(params, constants, state)[0],
            params,
            _read(order, state, x),
        )
        # Read before the unit's share is added: the identity passes the rest on.
        d_new = lax.dynamic_slice_in_dim(_read(order, dx, dy), start, width, -1)
        d_params, d_state = pull_back(d_new)
        return (state, dx + d_state), d_params

    inputs = (jnp.arange(count), params, constants)
    (_, dx), d_params = lax.scan(restore, (y, dy), inputs, reverse=True)
    return d_params, jax.tree.map(_no_gradient, constants), dx


_sweep.defvjp(_forward, _backward)


def _read(order: Order, state, start):
    return state if order == "gradual" else start


def _no_gradient(x: jax.Array):
    inexact = jnp.issubdtype(x.dtype, jnp.inexact)
    return jnp.zeros_like(x) if inexact else np.zeros(x.shape, jax.dtypes.float0)

"""Gradual updates of groups of channels, one after another (GUNN, arXiv 1711.09280).

The groups ("segments") run in a scan over stacked parameters. The backward pass is
another scan, which recomputes each unit. Compared with an unrolled loop differentiated
by JAX, five GUNN layers compiled 3 to 22 times faster and took 3 to 12 percent of the
memory and 0.5 to 1.1 times the time per step on two busy CPU cores
(benchmarks/results/gradual-*.csv).
"""

import functools
from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

Order = Literal["gradual", "simultaneous"]


class Gradual(nnx.Module):
    """Maps x (N, H, W, C) to y of equal shape: y[i] = x[i] + unit_i(s) per segment i.

    In the gradual order the state s holds segments 0..i-1 of y and i..n-1 of x; in the
    simultaneous order s = x. Segments are contiguous and have equal widths C / n.

    unit: builds a unit, C -> C / n channels, from its rngs. `units` is one such module
      whose variables have a leading axis of segments. Units may have batch statistics
      and connections, but no random streams (dropout).
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
            raise ValueError(
                f"unknown order {order!r}: choose from {', '.join(get_args(Order))}"
            )
        # vmap, because compiling n copies of the initialisers takes n times as long.
        build = lambda key: unit(nnx.Rngs(key))
        keys = jax.random.split(rngs.params(), segments)
        graphdef = nnx.graphdef(nnx.eval_shape(build, keys[0]))
        state = jax.vmap(lambda key: nnx.state(build(key)))(keys)
        self.units = nnx.merge(graphdef, state)
        self.channels, self.segments, self.order = channels, segments, order

    def __call__(self, x: jax.Array) -> jax.Array:
        if x.shape[-1] != self.channels:
            raise ValueError(
                f"a Gradual layer of {self.channels} channels got {x.shape[-1]}"
            )
        _record_nothing(self.units)
        graphdef, params, constants = nnx.split(self.units, nnx.Param, ...)

        def unit(params, constants, x):
            unit = nnx.merge(graphdef, params, constants, copy=True)
            return unit(x), nnx.state(unit, nnx.BatchStat)

        y, statistics = _sweep(unit, self.order, params, constants, x)
        nnx.update(self.units, statistics)
        return checkpoint_name(y, "convolution")

    def abstract_unit(self) -> nnx.Module:
        """Returns one unit with abstract variables."""
        graphdef, state = nnx.split(self.units)
        one = lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
        return nnx.merge(graphdef, jax.tree.map(one, state))


def unstack(units: nnx.Module) -> list[nnx.Module]:
    """Returns the units of a `Gradual`, one module per segment, as numpy copies."""
    graphdef, state = nnx.split(units)
    state = jax.tree.map(np.asarray, state)
    count = len(jax.tree.leaves(state)[0])
    return [
        nnx.merge(graphdef, jax.tree.map(lambda x, i=i: x[i], state))
        for i in range(count)
    ]


def _record_nothing(units: nnx.Module) -> None:
    """Turns off nnx.capture inside the units, because values cannot leave a scan."""
    for _, module in nnx.iter_modules(units):
        if hasattr(module, "__captures__"):
            module.__captures__ = ()


def _width(channels: int, segments: int) -> int:
    if segments < 1 or channels % segments:
        raise ValueError(f"{segments} segments do not divide {channels} channels")
    return channels // segments


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sweep(unit: Callable, order: Order, params, constants, x: jax.Array):
    """Returns y and the stacked batch statistics after the sweep.

    unit(params, constants, state) -> (update of the segment, batch statistics).
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
    """Runs the sweep in reverse, from x and y alone.

    Writing segment i of x back into the state restores the input of unit i, so the
    unit can be recomputed: 2 C H W values per image are stored instead of n C H W.
    Batch statistics are discarded, since the forward sweep has updated them.
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
        # Before adding d_state: y[i] = x[i] + ... passes this gradient on to x[i].
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

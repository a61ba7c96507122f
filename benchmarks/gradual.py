"""A GUNN layer in three forms, training: python -m benchmarks.gradual

scanned: nets/layers/gradual.py, a scan whose derivative computes each unit again.
saved: the same scan with JAX's derivative, which saves the state before every unit.
unrolled: a Python loop with JAX's derivative.

One layer with the gradients of everything: seconds to compile, milliseconds a step
(the least of the repeats, in which the forms take turns), and XLA's temporary memory.
`time` and `memory` are shares of the unrolled form's. A shared machine leaves only
these and the ratios of the compile times to be trusted.
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

import benchmarks
from nets.gunn import gunn_layer
from runtime import environment

# net, size, batch, channels, segments, shortcut
LAYERS = (
    ("gunn-15", 32, 16, 240, 20, "projection"),
    ("gunn-15", 16, 16, 300, 25, "projection"),
    ("gunn-15", 8, 16, 360, 30, "projection"),
    ("gunn-18", 56, 2, 400, 10, "none"),
    ("gunn-18", 7, 16, 2000, 50, "none"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--net", default="", help="only the layers of this net")
    options = parser.parse_args()
    environment.settle()  # as main.py: page faults would double the times on CPU
    layers = [layer for layer in LAYERS if options.net in layer[0]]
    rows = [row for layer in layers for row in measure(layer, options.repeats)]
    name = benchmarks.machine(jax.devices()[0].device_kind)
    benchmarks.write(f"gradual-{name}-jax{jax.__version__}", rows)


def measure(layer: tuple, repeats: int) -> list[dict]:
    net, size, batch, channels, segments, shortcut = layer
    module = nnx.jit(
        lambda: gunn_layer(channels, segments, shortcuts=(shortcut,), rngs=nnx.Rngs(0))
    )()
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((batch, size, size, channels)), jnp.float32)
    runs, rows = {}, []
    for form, function in FORMS.items():
        run, facts = compiled(function, module, x)
        runs[form] = run
        rows.append(
            {
                "net": net,
                "layer": f"{channels} in {segments} segments, {shortcut}",
                "size": size,
                "batch_size": batch,
                "form": form,
                **facts,
            }
        )
    least = dict.fromkeys(runs, float("inf"))
    for _ in range(repeats):
        for form, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            least[form] = min(least[form], time.perf_counter() - start)
    for row in rows:
        row["step_ms"] = round(1e3 * least[row["form"]], 1)
        row["time"] = round(least[row["form"]] / least["unrolled"], 2)
        row["memory"] = round(row["temporary_mb"] / rows[-1]["temporary_mb"], 2)
        print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    return rows


def compiled(function, module, x) -> tuple:
    """The gradient step as a call without arguments, warm, and what it cost."""
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)

    def loss(params, x):
        layer = nnx.merge(graphdef, params, rest, copy=True)
        y = function(layer, x)
        return (y * jnp.cos(y)).sum(), nnx.state(layer, nnx.BatchStat)

    step = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    start = time.perf_counter()
    program = step.lower(params, x).compile()
    facts = {
        "compile_s": round(time.perf_counter() - start, 1),
        "temporary_mb": round(program.memory_analysis().temp_size_in_bytes / 2**20, 1),
    }
    run = functools.partial(program, params, x)
    jax.block_until_ready(run())
    return run, facts


def saved(layer, x):
    graphdef, params, rest = nnx.split(layer.units, nnx.Param, ...)
    width = layer.channels // layer.segments

    def update(state, inputs):
        i, variables = inputs
        unit = nnx.merge(graphdef, *variables, copy=True)
        new = lax.dynamic_slice_in_dim(state, i * width, width, -1) + unit(state)
        state = lax.dynamic_update_slice_in_dim(state, new, i * width, -1)
        return state, nnx.state(unit, nnx.BatchStat)

    inputs = (jnp.arange(layer.segments), (params, rest))
    y, statistics = lax.scan(update, x, inputs)
    nnx.update(layer.units, statistics)
    return y


def unrolled(layer, x):
    graphdef, state = nnx.split(layer.units)
    width, statistics = layer.channels // layer.segments, []
    for i in range(layer.segments):
        unit = nnx.merge(graphdef, jax.tree.map(lambda v, i=i: v[i], state), copy=True)
        x = x.at[..., i * width : (i + 1) * width].add(unit(x))
        statistics.append(nnx.state(unit, nnx.BatchStat))
    nnx.update(layer.units, jax.tree.map(lambda *v: jnp.stack(v), *statistics))
    return x


FORMS = {"scanned": lambda layer, x: layer(x), "saved": saved, "unrolled": unrolled}


if __name__ == "__main__":
    main()

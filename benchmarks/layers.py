"""Milliseconds of each lowering of each layer: python -m benchmarks.layers

Measures the convolutions of ResNet-20 and DenseNet-BC-40-24, and grouped ones, at batch
size 64. Rounds over the lowerings of a layer are interleaved, and the fastest repeat
counts, because the machine may be shared. `of_native` is the time relative to XLA's own
convolution. With --blocks, measures expanders between blocks of channels instead,
relative to the dense convolution that `auto` selects.
"""

import argparse
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import benchmarks
from nets.layers.cpu import calls
from nets.layers.expander import ExpanderConv
from nets.layers.lowerings import Shape, applicable, choose, convolution
from runtime import processes

# net, size, in, out, window, stride, groups
LAYERS = (
    ("resnet20", 32, 3, 16, 3, 1, 1),
    ("resnet20", 32, 16, 16, 3, 1, 1),
    ("resnet20", 32, 16, 32, 3, 2, 1),
    ("resnet20", 16, 32, 32, 3, 1, 1),
    ("resnet20", 16, 32, 64, 3, 2, 1),
    ("resnet20", 8, 64, 64, 3, 1, 1),
    ("densenet40-24", 32, 120, 96, 1, 1, 1),
    ("densenet40-24", 32, 96, 24, 3, 1, 1),
    ("densenet40-24", 16, 168, 96, 1, 1, 1),
    ("densenet40-24", 16, 96, 24, 3, 1, 1),
    ("densenet40-24", 8, 192, 96, 1, 1, 1),
    ("densenet40-24", 8, 96, 24, 3, 1, 1),
    ("grouped", 16, 96, 24, 3, 1, 2),
    ("grouped", 16, 48, 48, 3, 1, 24),
    ("grouped", 16, 32, 32, 3, 1, 4),
    ("grouped", 8, 256, 256, 3, 1, 16),
    ("grouped", 16, 96, 96, 1, 1, 4),
    ("grouped", 8, 512, 512, 1, 1, 8),
    ("depthwise", 16, 128, 128, 3, 1, 128),
)
# size, in, out, window
EXPANDERS = ((32, 192, 96, 1), (16, 256, 256, 1), (16, 256, 64, 3))
BLOCKS, COMPRESS = (8, 16, 32), (2, 4, 8)
PARTS = ("forward", "input_gradient", "kernel_gradient")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--blocks", action="store_true")
    options = vars(parser.parse_args())
    for name in ("batch_size", "repeats"):
        if options[name] < 1:
            parser.error(f"--{name} must be at least 1, got {options[name]}")
    processes.set_environment()  # as main.py: page faults would double the times on CPU
    kind, function, layers = "layers", measure, LAYERS
    if options.pop("blocks"):
        kind, function, layers = "blocks", measure_blocks, EXPANDERS
    rows = [row for layer in layers for row in function(layer, **options)]
    name = benchmarks.machine(jax.devices()[0].device_kind)
    benchmarks.write(f"{kind}-{name}-jax{jax.__version__}", rows)


def measure(layer: tuple, batch_size: int, repeats: int) -> list[dict]:
    """Measures and prints all lowerings of a layer; returns a row for each."""
    net, size, i, o, window, stride, groups = layer
    rng = np.random.default_rng(0)
    x = normal(rng, batch_size, size, size, i)
    kernel = normal(rng, window, window, i // groups, o)
    geometry = {"stride": stride, "padding": window // 2, "groups": groups}
    shape = Shape.of(x, kernel, **geometry)
    auto = choose(shape, jax.default_backend(), calls.usable(x))
    programs, facts = {}, {}
    for name in applicable(shape):
        convolve = functools.partial(convolution, **geometry, lowering=name)
        programs[name] = compile_parts(convolve, x, kernel)
        facts[name] = {
            "net": net,
            "layer": f"{window}x{window} {i}->{o} /{stride} groups {groups}",
            "size": size,
            "batch_size": batch_size,
            "lowering": name,
            "auto": "*" if name == auto else "",
        }
    return tabulate(programs, facts, repeats, "native", "of_native")


def measure_blocks(layer: tuple, batch_size: int, repeats: int) -> list[dict]:
    """Measures and prints a layer with several blocks and compressions."""
    size, i, o, window = layer
    rng = np.random.default_rng(0)
    x = normal(rng, batch_size, size, size, i)
    convolve = functools.partial(convolution, padding=window // 2)
    dense = (1, 1, "dense")
    programs = {dense: compile_parts(convolve, x, normal(rng, window, window, i, o))}
    for compress, block in itertools.product(COMPRESS, BLOCKS):
        if i // compress % block:
            continue
        expander = ExpanderConv(
            *(i, o, window),
            degree=i // compress,
            sampling="per_output",
            block=block,
            padding=window // 2,
            rngs=nnx.Rngs(0),
        )
        expander.draw(rng)
        for lowering in ("auto", "blocks"):
            expander.lowering = lowering
            graphdef, kernel, rest = nnx.split(expander, nnx.Param, ...)

            def apply(x, kernel, graphdef=graphdef, rest=rest):
                return nnx.merge(graphdef, kernel, rest)(x)

            programs[compress, block, lowering] = compile_parts(apply, x, kernel)
    shared = {"layer": f"{window}x{window} {i}->{o}", "size": size}
    shared["batch_size"] = batch_size
    names = ("compress", "block", "lowering")
    facts = {key: shared | dict(zip(names, key, strict=True)) for key in programs}
    return tabulate(programs, facts, repeats, dense, "of_dense")


def normal(rng: np.random.Generator, *shape: int) -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def tabulate(programs, facts, repeats: int, reference, column: str) -> list[dict]:
    """Times and prints programs; returns the facts and the fastest repeat of each.

    programs: name -> result of compile_parts. facts: name -> first cells of its row.
    column: heading of the times relative to the program `reference`.
    """
    runs = {
        (name, part): run
        for name, parts in programs.items()
        for part, run in parts.items()
    }
    times = benchmarks.time_rounds(runs, repeats)
    least = {key: min(seconds) for key, seconds in times.items()}
    total = {name: sum(least[name, part] for part in PARTS) for name in programs}
    rows = []
    for name in programs:
        row = facts[name]
        row |= {f"{part}_ms": round(1e3 * least[name, part], 2) for part in PARTS}
        row[column] = round(total[name] / total[reference], 3)
        rows.append(row)
        print("  ".join(str(value) for value in row.values()), flush=True)
    return rows


def compile_parts(convolve, x, kernel) -> dict:
    """Returns {part: compiled function without arguments}."""
    forward = jax.jit(convolve)
    dy = jnp.ones_like(forward(x, kernel))

    @jax.jit
    def input_gradient(x, kernel, dy):
        return jax.vjp(lambda x: convolve(x, kernel), x)[1](dy)

    @jax.jit
    def kernel_gradient(x, kernel, dy):
        return jax.vjp(lambda kernel: convolve(x, kernel), kernel)[1](dy)

    runs = (
        functools.partial(forward, x, kernel),
        functools.partial(input_gradient, x, kernel, dy),
        functools.partial(kernel_gradient, x, kernel, dy),
    )
    for run in runs:
        jax.block_until_ready(run())
    return dict(zip(PARTS, runs, strict=True))


if __name__ == "__main__":
    main()

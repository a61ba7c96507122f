"""Milliseconds of each lowering of each layer: python -m benchmarks.layers

Measures the convolutions of ResNet-20 and DenseNet-BC-40-24, and grouped ones, at batch
size 64. Rounds over the lowerings of a layer are interleaved, and the fastest repeat
counts, because the machine may be shared. `of_native` is the time relative to XLA's own
convolution. With --blocks, measures expanders between blocks of channels instead,
relative to the dense convolution that `auto` selects.
"""

import argparse
import functools
import time

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
    blocks = options.pop("blocks")
    function, layers = (measure_blocks, EXPANDERS) if blocks else (measure, LAYERS)
    rows = [row for layer in layers for row in function(layer, **options)]
    name = benchmarks.machine(jax.devices()[0].device_kind)
    kind = "blocks" if blocks else "layers"
    benchmarks.write(f"{kind}-{name}-jax{jax.__version__}", rows)


def measure(layer: tuple, batch_size: int, repeats: int) -> list[dict]:
    """Measures and prints all lowerings of a layer; returns a row for each."""
    net, size, i, o, window, stride, groups = layer
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((batch_size, size, size, i)), jnp.float32)
    kernel = rng.standard_normal((window, window, i // groups, o))
    kernel = jnp.asarray(kernel, jnp.float32)
    geometry = {"stride": stride, "padding": window // 2, "groups": groups}
    shape = Shape.of(x, kernel, **geometry)
    auto = choose(shape, jax.default_backend(), calls.usable(x))
    names = applicable(shape)
    programs = {}
    for name in names:
        convolve = functools.partial(convolution, **geometry, lowering=name)
        programs[name] = compile_parts(convolve, x, kernel)
    least = fastest(programs, repeats)
    total = {name: sum(parts.values()) for name, parts in least.items()}
    rows = []
    for name in names:
        row = {
            "net": net,
            "layer": f"{window}x{window} {i}->{o} /{stride} groups {groups}",
            "size": size,
            "batch_size": batch_size,
            "lowering": name,
            "auto": "*" if name == auto else "",
            **{f"{part}_ms": round(1e3 * least[name][part], 2) for part in PARTS},
            "of_native": round(total[name] / total["native"], 3),
        }
        rows.append(row)
        print("  ".join(str(value) for value in row.values()), flush=True)
    return rows


def measure_blocks(layer: tuple, batch_size: int, repeats: int) -> list[dict]:
    """Measures and prints a layer with several blocks and compressions."""
    size, i, o, window = layer
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((batch_size, size, size, i)), jnp.float32)
    kernel = rng.standard_normal((window, window, i, o))
    convolve = functools.partial(convolution, padding=window // 2)
    dense = ("dense", 1, 1)
    programs = {dense: compile_parts(convolve, x, jnp.asarray(kernel, jnp.float32))}
    for compress in COMPRESS:
        for block in BLOCKS:
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

                key = (lowering, compress, block)
                programs[key] = compile_parts(apply, x, kernel)
    least = fastest(programs, repeats)
    rows = []
    for (lowering, compress, block), parts in least.items():
        row = {
            "layer": f"{window}x{window} {i}->{o}",
            "size": size,
            "batch_size": batch_size,
            "compress": compress,
            "block": block,
            "lowering": lowering,
            **{f"{part}_ms": round(1e3 * parts[part], 2) for part in PARTS},
            "of_dense": round(sum(parts.values()) / sum(least[dense].values()), 3),
        }
        rows.append(row)
        print("  ".join(str(value) for value in row.values()), flush=True)
    return rows


def fastest(programs: dict, repeats: int) -> dict:
    """Returns {program: {part: seconds}} of the fastest of some interleaved rounds."""
    least = {name: dict.fromkeys(PARTS, float("inf")) for name in programs}
    for _ in range(repeats):
        for name, parts in programs.items():
            for part, run in parts.items():
                start = time.perf_counter()
                jax.block_until_ready(run())
                seconds = time.perf_counter() - start
                least[name][part] = min(least[name][part], seconds)
    return least


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

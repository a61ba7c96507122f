"""Forms of a DelugeNet block, side by side: python -m benchmarks.cross_layer

A block, opened by a bare 1x1 and closed by one more reader: loss and all gradients.
The forms take turns; the least of the repeats counts, because others use the machine
too: compare the columns `of_nets`, shares of what `unrolled`, the form in nets/, takes.

unrolled: a list of maps, each normalised once, and a sum of products
fused: the same without CrossLayer's loops, so that XLA may compute anything anew
per_reader: as the original, a normalisation for each reader of each map
stacked: every reader stacks its maps and contracts them in one einsum
scanned: one loop over equal layers, a buffer for all maps, weights of zero for those
  that are not yet born
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import benchmarks
import nets
from nets.delugenet import Block, Projection
from nets.layers.cross_layer import CrossLayer, Source
from nets.layers.norm import BatchNorm
from nets.layers.wiring import Wiring
from runtime import environment

# net, block, size, channels, composite layers
BLOCKS = (
    ("146", 1, 32, 64, 7),
    ("146", 2, 16, 128, 16),
    ("146", 3, 8, 256, 24),
    ("92", 1, 56, 128, 7),
)


class Unrolled(nnx.Module):
    """x (N, H, W, C) -> what a reader of the whole block gets."""

    reader = CrossLayer

    def __init__(self, channels: int, num_layers: int):
        rngs = nnx.Rngs(0)
        options = dict(wiring=Wiring(), rngs=rngs)
        opening = Projection(channels, channels, rngs=rngs)
        self.block = Block(opening, channels // 2, num_layers, **options)
        for i, layer in enumerate(self.block.layers):
            if i:
                layer.cross = self.reader(channels, i + 1)
        self.closing = self.reader(channels, num_layers + 1)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.closing(self.block.sources([Source(x)]))


class FusedReader(CrossLayer):
    def __call__(self, sources):
        pairs = zip(self.scale[...], sources, strict=True)
        return self.bias[...].sum(0) + sum(scale * x.normalised for scale, x in pairs)


class Fused(Unrolled):
    reader = FusedReader


class NormalisingReader(CrossLayer):
    def __init__(self, channels, num_sources):
        super().__init__(channels, num_sources)
        norms = [BatchNorm(channels, affine=False) for _ in range(num_sources)]
        self.norms = nnx.List(norms)

    def __call__(self, sources):
        pairs = zip(sources, self.norms, strict=True)
        return super().__call__([Source(x.raw, norm(x.raw)) for x, norm in pairs])


class PerReader(Unrolled):
    reader = NormalisingReader

    def __call__(self, x):
        block, sources = self.block, [Source(x)]
        for unit in (block.opening, *block.layers):
            new = Source(unit(sources))
            sources = [new] if unit is block.opening else [*sources, new]
        return self.closing(sources)


class BufferReader(CrossLayer):
    def __call__(self, maps):
        """maps (L, N, H, W, C)."""
        mixed = jnp.einsum("lc,lnhwc->nhwc", self.scale[...], maps)
        return mixed + self.bias[...].sum(0)


class StackingReader(BufferReader):
    def __call__(self, sources):
        return super().__call__(jnp.stack([source.normalised for source in sources]))


class Stacked(Unrolled):
    reader = StackingReader


class Scanned(Unrolled):
    reader = BufferReader

    def __init__(self, channels, num_layers):
        super().__init__(channels, num_layers)
        for layer in self.block.layers[1:]:
            known, layer.cross = layer.cross, self.reader(channels, num_layers + 1)
            for name in ("scale", "bias"):
                values = getattr(known, name)[...]
                padding = ((0, num_layers + 1 - len(values)), (0, 0))
                getattr(layer.cross, name)[...] = jnp.pad(values, padding)

    def __call__(self, x):
        block = self.block
        first = block.opening([Source(x)])
        second = block.layers[0]([Source(first)])
        maps = jnp.zeros((len(block.norms), *first.shape), x.dtype)
        maps = maps.at[0].set(block.norms[0](first))
        maps = maps.at[1].set(block.norms[1](second))
        pairs = list(zip(block.layers[1:], block.norms[2:], strict=True))
        graphdef = nnx.graphdef(pairs[0])
        states = [nnx.to_pure_dict(nnx.state(pair)) for pair in pairs]

        def step(maps, inputs):
            i, state = inputs
            layer, norm = nnx.merge(graphdef, state)
            maps = maps.at[i].set(norm(layer(maps)))
            return maps, nnx.to_pure_dict(nnx.state((layer, norm), nnx.BatchStat))

        stacked = jax.tree.map(lambda *values: jnp.stack(values), *states)
        indices = jnp.arange(2, len(block.norms))
        maps, stats = jax.lax.scan(step, maps, (indices, stacked))
        for k, pair in enumerate(pairs):
            nnx.update(pair, jax.tree.map(lambda value, k=k: value[k], stats))
        return self.closing(maps)


FORMS = {
    "unrolled": Unrolled,
    "fused": Fused,
    "per_reader": PerReader,
    "stacked": Stacked,
    "scanned": Scanned,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--blocks", type=int, nargs="+", default=range(len(BLOCKS)))
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    options = parser.parse_args()
    forms = ["unrolled", *(x for x in options.forms if x != "unrolled")]
    environment.settle()  # as main.py: page faults would double the times on CPU
    rows = [
        row
        for block in options.blocks
        for row in measure(BLOCKS[block], forms, options.batch_size, options.repeats)
    ]
    name = benchmarks.machine(jax.devices()[0].device_kind)
    benchmarks.write(f"cross_layer-{name}-jax{jax.__version__}", rows)


def measure(block: tuple, forms: list[str], batch_size: int, repeats: int):
    net, number, size, channels, num_layers = block
    rng = np.random.default_rng(0)
    shape = (batch_size, size, size, channels)
    x = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    programs = {name: compiled(FORMS[name], channels, num_layers, x) for name in forms}
    losses = {name: float(run()[0][0]) for name, (run, _) in programs.items()}
    assert np.ptp(list(losses.values())) < 1e-3 * abs(min(losses.values())), losses
    least = dict.fromkeys(forms, float("inf"))
    for _ in range(repeats):
        for name, (run, _) in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            least[name] = min(least[name], time.perf_counter() - start)
    rows = []
    for name, (_, facts) in programs.items():
        ours = programs[forms[0]][1]
        row = {
            "block": f"{net}, {number}: {num_layers + 1} of {channels}",
            "size": size,
            "batch_size": batch_size,
            "form": name,
            **facts,
            "step_ms": round(1e3 * least[name], 1),
            "compile_of_nets": round(facts["compile_s"] / ours["compile_s"], 2),
            "memory_of_nets": round(facts["temporary_mb"] / ours["temporary_mb"], 2),
            "step_of_nets": round(least[name] / least[forms[0]], 2),
        }
        rows.append(row)
        print("  ".join(str(value) for value in row.values()), flush=True)
    return rows


def compiled(form: type, channels: int, num_layers: int, x: jax.Array):
    """(A call without arguments of loss and gradients, what compiling it took)."""
    definition, variables = nets.split(form(channels, num_layers))

    def loss(params, x):
        state = variables | {"params": params}
        y, stats = definition.apply(state, x, train=True)
        return jnp.square(y).mean() + y[0, 0, 0, 0], stats

    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    start = time.perf_counter()
    program = gradient.lower(variables["params"], x).compile()
    seconds = time.perf_counter() - start
    facts = {
        "compile_s": round(seconds, 1),  # with tracing
        "temporary_mb": round(program.memory_analysis().temp_size_in_bytes / 2**20, 1),
    }
    return lambda: program(variables["params"], x), facts


if __name__ == "__main__":
    main()

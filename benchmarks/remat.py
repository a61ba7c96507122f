"""Time and memory of the levels of config.net.remat: python -m benchmarks.remat

Runs the forward and backward pass of a net in training mode with each level of
nets/remat.py, in interleaved rounds of one call, and prints the median. `temporary_mib`
is the memory that the compiled program allocates. benchmarks.saved counts the bytes
that the backward pass reads.
"""

import argparse
import statistics

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import benchmarks
import nets
from nets import remat
from runtime import processes

VARIANTS = {  # with the number of images
    "cfmz:110": 64,
    "xdensenet:40-24": 64,
    "igcnets:plain-38-L24M2": 64,
    "gunn:15": 32,
    "delugenets:146": 32,
    "xvgg:16-bn-expander": 64,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    processes.set_environment()  # as main.py: page faults would double the times on CPU
    rows = [row for name in options.variants for row in measure(name, options.rounds)]
    name = benchmarks.machine(jax.devices()[0].device_kind)
    benchmarks.write(f"remat-{name}-jax{jax.__version__}", rows)


def measure(variant: str, rounds: int) -> list[dict]:
    """Measures and prints all levels of a variant; returns a row for each."""
    config = benchmarks.get_config(variant).net
    images = VARIANTS.get(variant, 64)
    net = nets.create(config, nnx.Rngs(0))
    x = np.random.default_rng(0).standard_normal((images, 32, 32, 3), np.float32)
    programs, rows = {}, {}
    for level in remat.LEVELS:
        nets.configure(net, remat=level)
        definition, variables = nets.split(net)

        def forward(params, variables, x, definition=definition):
            variables = variables | {"params": params}
            logits, stats = definition.apply(variables, x, train=True)
            return jnp.mean(jax.nn.logsumexp(logits, -1) - logits[:, 0]), stats

        arguments = (variables["params"], variables, x)
        step = jax.jit(jax.value_and_grad(forward, has_aux=True))
        compiled = step.lower(*arguments).compile()
        temporary = compiled.memory_analysis().temp_size_in_bytes
        programs[level] = lambda run=compiled, args=arguments: run(*args)
        rows[level] = {
            "variant": variant,
            "batch_size": images,
            "remat": level,
            "temporary_mib": round(temporary / 2**20),
        }
    times = benchmarks.time_rounds(programs, rounds + 1)
    for level, row in rows.items():
        mine, none = times[level][1:], times["none"][1:]  # after a warm-up
        row["ms"] = round(1e3 * statistics.median(mine))
        pairs = zip(mine, none, strict=True)
        row["time_of_none"] = round(statistics.median(a / b for a, b in pairs), 3)
        print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    return list(rows.values())


if __name__ == "__main__":
    main()

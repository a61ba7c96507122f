"""The bytes that a training step saves for its gradients: python -m benchmarks.saved

Counts, for each net of benchmarks.models and each level of config.net.remat, the bytes
of the arrays that jax.vjp keeps, from shapes alone, and, if PyTorch is installed, the
bytes that it saves for the same net (torch_nets.py). Parameters and images do not
count, because they exist anyway. Lowerings are chosen for the machine that it runs on.
"""

import argparse
import importlib.util
import math

import jax
import numpy as np
import optax
from flax import nnx

import benchmarks
import nets
from benchmarks import models
from configs.data_sets import DATA_SETS
from nets import remat


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    choices = list(models.NETS)
    parser.add_argument("--variants", nargs="+", choices=choices, default=choices)
    for variant in parser.parse_args().variants:
        row = measure(variant)
        print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
        benchmarks.merge(f"saved-jax{jax.__version__}", [row], "variant")


def measure(variant: str) -> dict:
    """Returns a row of the table: sizes in MiB."""
    config, images = benchmarks.get_config(variant), models.NETS[variant].batch_size
    side = DATA_SETS[config.data.name].image_size
    net = nets.create(config.net, nnx.Rngs(0))
    row = {"variant": variant, "batch_size": images}
    for level in remat.LEVELS:
        nets.configure(net, remat=level)
        row[level] = _mib(kept_bytes(net, (images, side, side, 3)))
    row["pytorch"] = ""
    if importlib.util.find_spec("torch"):
        nets.configure(net, remat="none")
        row["pytorch"] = _mib(_saved_by_pytorch(net, (images, 3, side, side)))
    return row


def kept_bytes(net: nnx.Module, shape: tuple[int, int, int, int]) -> int:
    """Returns the bytes that a step saves for the gradients of a net's parameters.

    shape: of the images (N, H, W, 3). They and the parameters do not count.
    """
    definition, variables = nets.split(net)

    def loss(params, x):
        merged = variables | {"params": params}
        logits, _ = definition.apply(merged, x, train=True)
        labels = np.zeros(len(x), np.int32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def keep(params, x):
        return jax.tree.leaves(jax.vjp(lambda params: loss(params, x), params)[1])

    images = jax.ShapeDtypeStruct(shape, np.float32)
    program = jax.make_jaxpr(keep)(variables["params"], images).jaxpr
    computed = {y for equation in program.eqns for y in equation.outvars}
    kept = {y for y in program.outvars if isinstance(y, jax.extend.core.Var)} & computed
    return sum(math.prod(y.aval.shape) * y.aval.dtype.itemsize for y in kept)


def _saved_by_pytorch(net: nnx.Module, shape: tuple[int, int, int, int]) -> int:
    import torch
    from torch.nn.functional import cross_entropy

    from benchmarks import torch_nets

    twin, images = torch_nets.Twin(net), torch.zeros(shape)
    labels = torch.zeros(shape[0], dtype=torch.long)
    known = [images, *twin.parameters(), *twin.buffers()]
    return models.saved_bytes(lambda: cross_entropy(twin(images), labels), known)


def _mib(size: int) -> float:
    return round(size / 2**20, 1)


if __name__ == "__main__":
    main()

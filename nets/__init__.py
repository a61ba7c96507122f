"""The registry: name -> class, and one way to build a net from a configuration."""

import dataclasses
import difflib
import fnmatch
import inspect
from collections.abc import Mapping

import jax
from flax import nnx

from nets import connectivity
from nets.alexnet import AlexNet
from nets.delugenet import DelugeNet
from nets.densenet import DenseNet, ImageNetDenseNet
from nets.gunn import Gunn
from nets.layers.expander import Connectivity, Expander
from nets.layers.wiring import Wiring
from nets.mobilenet import MobileNet
from nets.plain import IgcImageNetResNet, IgcResNet, Plain
from nets.resnet import CfmzResNet, ResNet
from nets.vgg import VGG

__all__ = ["Connectivity", "Definition", "create", "names", "split"]

NETS: dict[str, type[nnx.Module]] = {
    "alexnet": AlexNet,
    "cfmz_resnet": CfmzResNet,
    "delugenet": DelugeNet,
    "densenet": DenseNet,
    "gunn": Gunn,
    "densenet_imagenet": ImageNetDenseNet,
    "igc_resnet": IgcResNet,
    "igc_resnet_imagenet": IgcImageNetResNet,
    "mobilenet": MobileNet,
    "plain": Plain,
    "resnet": ResNet,
    "vgg": VGG,
}
WIRING_FIELDS = {
    "wiring": "kind",
    "compress": "compress",
    "sampling": "sampling",
    "groups": "groups",
    "primary_groups": "primary_groups",
    "secondary_groups": "secondary_groups",
}
RUN_ONCE = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}


def names(pattern: str = "*") -> list[str]:
    """Registered names that match a shell pattern."""
    return fnmatch.filter(sorted(NETS), pattern)


def create(config: Mapping, rngs: nnx.Rngs) -> nnx.Module:
    """The net of a configuration's `net` section; logits in float32 at least.

    Fields: `name`; `graph_seed` (expander graphs are a function of it and of the
    layer's path), `lowering` (of every convolution); the wiring's (`wiring`,
    `compress`, `sampling`, `groups`, `primary_groups`, `secondary_groups`); the rest
    goes to the class by name. Works under nnx.eval_shape too. Raises ValueError on
    what cannot be built.
    """
    options = dict(config)
    name = options.pop("name")
    if name not in NETS:
        nearest = difflib.get_close_matches(str(name), NETS, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"unknown net {name!r}: choose from {names()}{hint}")
    graph_seed, lowering = options.pop("graph_seed", 0), options.pop("lowering", "auto")
    wiring = {WIRING_FIELDS[k]: options.pop(k) for k in WIRING_FIELDS if k in options}
    accepted = set(inspect.signature(NETS[name].__init__).parameters)
    accepted -= {"self", "wiring", "rngs"}
    if unknown := sorted(set(options) - accepted):
        raise ValueError(
            f"net {name!r} has no field {unknown}: choose from {sorted(accepted)}, "
            f"and {sorted(WIRING_FIELDS)} for its wiring"
        )

    def build(key):
        rngs = nnx.Rngs(dropout=jax.random.fold_in(key, 1))
        rngs.params = _Stream(key, tag="params")
        try:
            return NETS[name](wiring=Wiring(**wiring), rngs=rngs, **options)
        except TypeError as error:  # such as layers=(2.5, 3)
            raise ValueError(f"net {name!r} cannot be built: {error}") from error

    key = rngs.params()
    if isinstance(key, jax.core.Tracer):  # under nnx.eval_shape: shapes only
        net = build(key)
    else:
        # One program instead of one compilation per initialiser; it runs once, so
        # its compilation is worth 2 s, not the 5 s of full optimisation.
        init = jax.jit(lambda key: nnx.state(build(key)), compiler_options=RUN_ONCE)
        net = nnx.merge(nnx.graphdef(nnx.eval_shape(build, key)), init(key))
    for path, module in nnx.iter_modules(net):
        if isinstance(module, Expander):
            path = ".".join(map(str, path))
            module.draw(connectivity.layer_rng(graph_seed, path))
        if hasattr(module, "lowering"):
            module.lowering = lowering
    return net


class _Stream(nnx.RngStream):
    """The keys of nnx.RngStream, counted in Python.

    Its own count lives in the traced program, where each update costs time that grows
    with the program: minutes for the 1,202 layers of the deepest ResNet.
    """

    taken = 0

    def __call__(self) -> jax.Array:
        key = jax.random.fold_in(self.key[...], self.taken)
        self.taken += 1
        return key


@dataclasses.dataclass(frozen=True)
class Definition:
    """A net without its numbers, for pure functions under plain jax.jit.

    Walking the module tree on every call, as nnx.jit does, starves an accelerator.
    """

    graphdef: nnx.GraphDef
    constants: dict  # what is neither of the three kinds below: dropout's streams

    def apply(
        self, variables: dict, x: jax.Array, *, train: bool = False, key=None
    ) -> tuple[jax.Array, dict]:
        """x (N, H, W, C) -> (logits, batch statistics after this batch).

        `key` seeds dropout, for training nets that have it.
        """
        kinds = (variables["params"], variables["stats"], variables["wiring"])
        # copy: without it the update of batch statistics under grad is an error.
        net = nnx.merge(self.graphdef, *kinds, self.constants, copy=True)
        net.train() if train else net.eval()
        if key is not None:
            nnx.reseed(net, dropout=key)
        return net(x), nnx.to_pure_dict(nnx.state(net, nnx.BatchStat))


def split(net: nnx.Module) -> tuple[Definition, dict]:
    """A net as its definition and its variables: params, stats, wiring.

    Each is a nested dict of arrays whose keys are the attributes of the net, such as
    params['blocks'][0][2]['conv1']['kernel'].
    """
    graphdef, params, stats, wiring, constants = nnx.split(
        net, nnx.Param, nnx.BatchStat, Connectivity, ...
    )
    variables = {"params": params, "stats": stats, "wiring": wiring}
    return Definition(graphdef, constants), {
        kind: nnx.to_pure_dict(state) for kind, state in variables.items()
    }

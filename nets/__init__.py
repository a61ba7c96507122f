"""The registry of networks, and the functions that create and configure one."""

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Collection, Mapping

import jax
from flax import nnx

from nets import connectivity
from nets import remat as recomputation
from nets.alexnet import AlexNet
from nets.delugenet import DelugeNet
from nets.densenet import DenseNet, ImageNetDenseNet
from nets.gunn import Gunn
from nets.intermediates import capture
from nets.layers import lowerings
from nets.layers.expander import Connectivity, Expander
from nets.layers.norm import BatchNorm
from nets.layers.wiring import Wiring
from nets.mobilenet import MobileNet
from nets.plain import IgcImageNetResNet, IgcResNet, Plain
from nets.resnet import CfmzResNet, ResNet
from nets.vgg import VGG

__all__ = [
    "Connectivity",
    "Definition",
    "capture",
    "configure",
    "create",
    "names",
    "split",
]

NETS: dict[str, type[nnx.Module]] = {
    "alexnet": AlexNet,
    "cfmz_resnet": CfmzResNet,
    "delugenet": DelugeNet,
    "densenet": DenseNet,
    "densenet_imagenet": ImageNetDenseNet,
    "gunn": Gunn,
    "igc_resnet": IgcResNet,
    "igc_resnet_imagenet": IgcImageNetResNet,
    "mobilenet": MobileNet,
    "plain": Plain,
    "resnet": ResNet,
    "vgg": VGG,
}
WIRING_FIELDS = [field.name for field in dataclasses.fields(Wiring)]
# Compiler options for a program that runs once: 2 s instead of 5 s to compile.
RUN_ONCE = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}


def names() -> list[str]:
    """Returns the registered names, sorted."""
    return sorted(NETS)


def create(config: Mapping, rngs: nnx.Rngs) -> nnx.Module:
    """Returns the net of a configuration's `net` section.

    `name` selects the class. `wiring` has the fields of nets.layers.wiring.Wiring.
    `lowering`, `graph_seed` and `remat` go to `configure`, all other fields to the
    class. Logits are at least float32. Works under nnx.eval_shape. Raises ValueError
    for unknown fields and invalid values.
    """
    options = dict(config)
    name = options.pop("name")
    _check_moved(options)
    if name not in NETS:
        raise ValueError(f"unknown net {name!r}: {_choices(name, names())}")
    defaults = dict(lowering="auto", graph_seed=0, remat="none")
    properties = {x: options.pop(x, default) for x, default in defaults.items()}
    wiring = _make_wiring(options.pop("wiring", {}))
    accepted = inspect.signature(NETS[name].__init__).parameters.keys()
    accepted -= {"self", "wiring", "rngs"}
    for field in sorted(options.keys() - accepted):
        raise ValueError(
            f"net {name!r} has no field {field!r}: {_choices(field, accepted)}"
        )

    def build(key: jax.Array) -> nnx.Module:
        rngs = nnx.Rngs(dropout=jax.random.fold_in(key, 1))
        rngs.params = _Stream(key, tag="params")
        try:
            return NETS[name](wiring=wiring, rngs=rngs, **options)
        except TypeError as error:  # such as layers=(2.5, 3)
            raise ValueError(f"net {name!r} cannot be built: {error}") from error

    net = _initialize(build, rngs.params())
    configure(net, **properties)
    return net


def configure(
    net: nnx.Module,
    *,
    lowering: str | None = None,
    graph_seed: int | None = None,
    batch_norm_groups: int | None = None,
    remat: str | None = None,
) -> None:
    """Sets the properties that modules do not know when they are constructed.

    lowering: the lowering of every convolution (nets/layers/lowerings.py).
    graph_seed: draws each expander graph from this seed and its layer's path.
    batch_norm_groups: ghost batch norm. Splits the batch into this many groups with
      separate statistics, over all devices of the mesh axis "data"; 1 is synchronised
      batch norm. 0: separate statistics on each device.
    remat: what the backward pass of the whole net recomputes (nets/remat.py).
    None leaves a setting unchanged.
    """
    if remat is not None:
        recomputation.check(remat)
        net.remat = remat
    lowerings.check(lowering or "auto")
    for path, module in nnx.iter_modules(net):
        if lowering is not None and hasattr(module, "lowering"):
            module.lowering = lowering
        if graph_seed is not None and isinstance(module, Expander):
            layer = ".".join(map(str, path))
            module.draw(connectivity.make_layer_rng(graph_seed, layer))
        if batch_norm_groups is not None and isinstance(module, BatchNorm):
            module.axis_name = "data" if batch_norm_groups else None
            module.groups = batch_norm_groups or 1


def _check_moved(options: Mapping) -> None:
    """Raises ValueError for fields of the wiring outside its section."""
    if flat := [field for field in WIRING_FIELDS if field in options]:
        flags = [f"--config.net.wiring.{field}={options[field]}" for field in flat]
        raise ValueError(
            f"{', '.join(flat)} moved to the section net.wiring: use {' '.join(flags)}"
        )


def _make_wiring(section: Mapping | str) -> Wiring:
    if isinstance(section, str):
        raise ValueError(
            f"net.wiring is a section now: use --config.net.wiring.kind={section}"
        )
    for field in section:
        if field not in WIRING_FIELDS:
            hint = _choices(field, WIRING_FIELDS)
            raise ValueError(f"net.wiring has no field {field!r}: {hint}")
    return Wiring(**section)


def _choices(given: str, choices: Collection[str]) -> str:
    nearest = difflib.get_close_matches(str(given), choices, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    return f"choose from {', '.join(sorted(choices))}{hint}"


def _initialize(build: Callable[[jax.Array], nnx.Module], key) -> nnx.Module:
    """Builds a net in one program instead of one compilation per initialiser."""
    if isinstance(key, jax.core.Tracer):  # nnx.eval_shape requires no values
        return build(key)
    init = jax.jit(lambda key: nnx.state(build(key)), compiler_options=RUN_ONCE)
    return nnx.merge(nnx.graphdef(nnx.eval_shape(build, key)), init(key))


class _Stream(nnx.RngStream):
    """An nnx.RngStream that counts its keys in Python.

    The count of nnx.RngStream is part of the traced program, where the cost of each
    update grows with the program: minutes for the 1,202 layers of the deepest ResNet.
    """

    taken = 0

    def __call__(self) -> jax.Array:
        key = jax.random.fold_in(self.key[...], self.taken)
        self.taken += 1
        return key


@dataclasses.dataclass(frozen=True)
class Definition:
    """A net without its variables, for pure functions under plain jax.jit.

    nnx.jit walks the module tree on every call, which starves an accelerator.
    """

    graphdef: nnx.GraphDef
    constants: nnx.State  # all other variables, such as dropout's random streams
    remat: str = "none"  # nets/remat.py

    def apply(
        self, variables: dict, x: jax.Array, *, train: bool = False, key=None
    ) -> tuple[jax.Array, dict]:
        """Maps x (N, H, W, C) to logits and the batch statistics after this batch.

        key: for dropout; only used in training.
        """

        def forward(variables, x, key):
            net = self.merge(variables)
            net.train() if train else net.eval()
            if key is not None:
                nnx.reseed(net, dropout=key)
            return net(x), nnx.to_pure_dict(nnx.state(net, nnx.BatchStat))

        return recomputation.recompute(forward, self.remat)(variables, x, key)

    def merge(self, variables: dict) -> nnx.Module:
        """Returns the net with these variables; the inverse of `split`."""
        kinds = (variables["params"], variables["stats"], variables["wiring"])
        # Without copy=True, updating batch statistics under jax.grad is an error.
        return nnx.merge(self.graphdef, *kinds, self.constants, copy=True)


def split(net: nnx.Module) -> tuple[Definition, dict]:
    """Splits a net into its definition and its variables: params, stats, wiring.

    Each is a nested dict of arrays whose keys are the net's attributes, such as
    params['blocks'][0][2]['conv1']['kernel'].
    """
    graphdef, params, stats, wiring, constants = nnx.split(
        net, nnx.Param, nnx.BatchStat, Connectivity, ...
    )
    variables = {"params": params, "stats": stats, "wiring": wiring}
    return Definition(graphdef, constants, getattr(net, "remat", "none")), {
        kind: nnx.to_pure_dict(state) for kind, state in variables.items()
    }

"""Parameters and multiply-accumulates per layer; shapes only, nothing is compiled.

A layer takes part by two conventions. Its parameter `kernel` holds the weights that
each position of its output uses once (a bias or a scale is a parameter without
multiply-accumulates). If weights of its dense twin are not stored, it has a property
`absent_weights`, their number.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

import nets
from nets.layers.gradual import Gradual


@dataclasses.dataclass(frozen=True)
class Cost:
    """Counts of what exists, and of the dense twin; `macs` are those of one image."""

    parameters: int
    dense_parameters: int
    macs: int
    dense_macs: int


@dataclasses.dataclass(frozen=True)
class LayerCost(Cost):
    """One module with parameters of its own; `path` as in the net: blocks.0.2.conv1.

    output_shape: of its last call, batch included; () if it is never called.
    """

    path: str
    kind: str
    output_shape: tuple[int, ...]


def layers(net: nnx.Module, input_shape: tuple[int, ...]) -> list[LayerCost]:
    """The layers of a net, concrete or abstract, in the order of computation.

    input_shape: (N, H, W, C). Normalisation and pooling cost no multiply-accumulates,
    as in the tables of all five papers.
    """
    modules = {_dotted(path): module for path, module in nnx.iter_modules(net)}
    parameters = {}
    for path, variable in nnx.to_flat_state(nnx.state(net, nnx.Param)):
        parameters.setdefault(_dotted(path[:-1]), {})[path[-1]] = variable.get_value()
    calls = _calls(net, input_shape)
    order = {path: i for i, path in enumerate(calls)}
    return [
        _layer(path, modules[path], parameters[path], calls.get(path, ()))
        for path in sorted(parameters, key=lambda path: order.get(path, len(order)))
    ]


def build(net_config: Mapping) -> nnx.Module:
    """Returns the abstract net of a configuration: shapes, no arrays."""
    return nnx.eval_shape(lambda: nets.create(net_config, nnx.Rngs(0)))


def of(net_config: Mapping, image_shape: tuple[int, int, int]) -> list[LayerCost]:
    """Returns the costs of a configuration's layers for one image (H, W, 3)."""
    return layers(build(net_config), (1, *image_shape))


def total(layers: list[LayerCost]) -> Cost:
    fields = [field.name for field in dataclasses.fields(Cost)]
    return Cost(*(sum(getattr(layer, field) for layer in layers) for field in fields))


def _layer(path, module, parameters, output_shapes) -> LayerCost:
    stored = sum(array.size for array in parameters.values())
    absent = getattr(module, "absent_weights", 0)
    weights = parameters["kernel"].size if "kernel" in parameters else 0
    positions = sum(math.prod(shape[1:-1]) for shape in output_shapes)
    return LayerCost(
        parameters=stored,
        dense_parameters=stored + absent,
        macs=weights * positions,
        dense_macs=(weights + absent) * positions,
        path=path,
        kind=type(module).__name__,
        output_shape=output_shapes[-1] if output_shapes else (),
    )


def _calls(net, input_shape) -> dict[str, list[tuple[int, ...]]]:
    """path of a module -> output shape of each call, in the order of computation."""
    graphdef, state = nnx.split(net)

    def forward(state, x):
        net = nnx.merge(graphdef, state, copy=True)
        net.eval()
        capture = nnx.capture(net, nnx.Intermediate, method_outputs=nnx.Intermediate)
        return {
            _dotted(path[:-1]): variable.get_value()
            for path, variable in nnx.to_flat_state(capture(x)[1])
            if path[-1] == "__call__"
        }

    x = jax.ShapeDtypeStruct(input_shape, jnp.float32)
    jaxpr, outputs = jax.make_jaxpr(forward, return_shape=True)(state, x)
    written = {
        variable: i
        for i, equation in enumerate(jaxpr.jaxpr.eqns)
        for variable in equation.outvars
    }
    leaves = jax.tree.leaves_with_path(outputs)
    order = {
        path[0].key: written.get(variable, -1)
        for (path, _), variable in zip(leaves, jaxpr.jaxpr.outvars, strict=True)
    }
    modules = {_dotted(path): module for path, module in nnx.iter_modules(net)}
    calls = {}
    for path in sorted(outputs, key=order.__getitem__):
        calls[path] = [output.shape for output in outputs[path]]
        if isinstance(modules[path], Gradual):
            # Its loop hides the calls: those of one unit, as kernels hold them all.
            units = _calls(modules[path].abstract_unit(), calls[path][0])
            inside = path and f"{path}.", "units."
            calls |= {"".join((*inside, k)): shapes for k, shapes in units.items()}
    return calls


def _dotted(path: tuple) -> str:
    return ".".join(map(str, path))

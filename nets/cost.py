"""Counts parameters and multiply-adds by layer, from shapes alone.

Layers follow two conventions. Each output position uses every weight of the parameter
`kernel` once; other parameters, such as a bias or a scale, cost no multiply-adds. A
property `absent_weights`, if any, counts the weights that only the dense twin has; it
is negative for a layer that the twin lacks.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

import nets
from nets import intermediates
from nets.layers.gradual import Gradual


@dataclasses.dataclass(frozen=True)
class Cost:
    """Counts of a net or layer and of its dense twin. macs: multiply-adds per image."""

    parameters: int
    dense_parameters: int
    macs: int
    dense_macs: int


@dataclasses.dataclass(frozen=True)
class LayerCost(Cost):
    """The cost of one module that has parameters.

    path: its path in the net, such as "blocks.0.2.conv1".
    kind: the name of its class.
    output_shape: of its last call, including the batch; () if it is never called.
    """

    path: str
    kind: str
    output_shape: tuple[int, ...]


def build(net_config: Mapping) -> nnx.Module:
    """Returns the net of a configuration's `net` section: shapes, no arrays."""
    # Counts do not depend on the graphs, and drawing them can take most of the time.
    config = dict(net_config) | {"graph_seed": None}
    return nnx.eval_shape(lambda: nets.create(config, nnx.Rngs(0)))


def of(net_config: Mapping, image_shape: tuple[int, int, int]) -> list[LayerCost]:
    """Returns the layers of a configuration's `net` for one image (H, W, C)."""
    return layers(build(net_config), (1, *image_shape))


def layers(net: nnx.Module, input_shape: tuple[int, ...]) -> list[LayerCost]:
    """Returns the layers of a net, concrete or abstract, in the order of execution.

    input_shape: (N, H, W, C). Normalisation and pooling cost no multiply-adds, as in
    the tables of all five papers.
    """
    modules = {_dotted(path): module for path, module in nnx.iter_modules(net)}
    parameters = {}
    for path, variable in nnx.to_flat_state(nnx.state(net, nnx.Param)):
        parameters.setdefault(_dotted(path[:-1]), {})[path[-1]] = variable.get_value()
    calls = _calls(net, input_shape)
    paths = [path for path in calls if path in parameters]
    paths += [path for path in parameters if path not in calls]
    return [
        _layer(path, modules[path], parameters[path], calls.get(path, ()))
        for path in paths
    ]


def total(layers: list[LayerCost]) -> Cost:
    """Returns the sum over layers."""
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


def _calls(net: nnx.Module, input_shape) -> dict[str, list[tuple[int, ...]]]:
    """Returns the output shapes of each module's calls, in the order of execution.

    NNX sorts attributes when it merges a module, and captured outputs by path, so the
    order is taken from the equations that compute the outputs.
    """
    graphdef, state = nnx.split(net)
    paths = []  # of the outputs of `forward`

    def forward(state, x):
        net = nnx.merge(graphdef, state, copy=True)
        net.eval()
        outputs = intermediates.outputs(net, x)
        paths.extend(path for path, calls in outputs.items() for _ in calls)
        return [output for calls in outputs.values() for output in calls]

    x = jax.ShapeDtypeStruct(input_shape, jnp.float32)
    jaxpr = jax.make_jaxpr(forward)(state, x).jaxpr
    order = {y: i for i, equation in enumerate(jaxpr.eqns) for y in equation.outvars}
    modules = {_dotted(path): module for path, module in nnx.iter_modules(net)}
    outputs = zip(paths, jaxpr.outvars, strict=True)
    calls = {}
    for path, y in sorted(outputs, key=lambda output: order.get(output[1], -1)):
        calls.setdefault(path, []).append(y.aval.shape)
        if isinstance(modules[path], Gradual):
            # Calls inside its loop are not captured. The kernels stack all units, so
            # count the calls of one unit.
            unit = _calls(modules[path].abstract_unit(), y.aval.shape)
            inside = f"{path}.units" if path else "units"
            calls |= {f"{inside}.{name}": shapes for name, shapes in unit.items()}
    return calls


def _dotted(path: tuple) -> str:
    return ".".join(map(str, path))

"""What each variable of a net is made of: reference tensors and a change of layout.

The mapping goes by our variables, not by their tensors, because the relation is not
one to one: a mask feeds an expander's edges and tells which weights its kernel keeps;
one stacked kernel may hold the weights of many reference layers.
"""

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nets.layers.expander import Connectivity, Expander

Path = tuple[str | int, ...]

TORCH_LEAVES = {  # our variables -> Torch's and PyTorch's names of a layer's tensors
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
    "edges": "mask",  # X-Nets, and expander variants that no original has
}


class ImportMismatch(ValueError):
    """Reference tensors that do not fit the net; the message names them all."""


class Source(NamedTuple):
    """The reference tensors of one variable.

    shapes: name -> shape in the reference layout.
    join: these tensors, in this order -> the variable.
    split: the inverse, for gradients and statistics too; {name: array} of those
      tensors that the variable determines, zero where other variables do.
    """

    shapes: dict[str, tuple[int, ...]]
    join: Callable[..., np.ndarray]
    split: Callable[[np.ndarray], dict[str, np.ndarray]]


class Importer(NamedTuple):
    """How a reference network becomes one of ours.

    net: our class. section: the reference's configuration -> the `net` section of
    ours. sources: a net of that class -> what each of its variables is made of, in the
    net's present mode (train or eval) where an original keeps statistics differently.
    of_tensors: (section, names of the tensors) -> the section that they tell, where a
    configuration leaves a choice open.
    """

    net: type[nnx.Module]
    section: Callable[[Mapping], dict]
    sources: Callable[[nnx.Module], dict[Path, Source]]
    of_tensors: Callable[[dict, Collection[str]], dict] = lambda section, names: section


def empty(build: Callable[[], nnx.Module]) -> nnx.Module:
    """The module that `build` makes, with zeros for values; nothing is compiled."""
    graphdef, state = nnx.split(nnx.eval_shape(build))
    zeros = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype)), state)
    return nnx.merge(graphdef, zeros)


def by_layer(
    net: nnx.Module, name: Callable[[Path, nnx.Module], str]
) -> dict[Path, Source]:
    """Sources of a net whose layers are those of the reference, one to one.

    name: (path of a variable, its layer) -> name of the reference tensor. Reference
    layouts are OIHW and OI; an expander's `edges` come as a mask of the same shape as
    its weights.
    """
    modules = dict(nnx.iter_modules(net))
    sources = {}
    kinds = nnx.Any(nnx.Param, nnx.BatchStat, Connectivity)
    for path, variable in nnx.to_flat_state(nnx.state(net, kinds)):
        module = modules[path[:-1]]
        if not isinstance(module, Expander):
            sources[path] = _plain(name(path, module), variable.get_value().shape)
        elif path[-1] == "edges":
            sources[path] = _edges(name(path, module), module)
        else:
            mask_name = name((*path[:-1], "edges"), module)
            sources[path] = _compact(name(path, module), mask_name, module)
    return sources


def assign(
    net: nnx.Module, sources: Mapping[Path, Source], tensors: Mapping[str, np.ndarray]
) -> None:
    """Sets the variables; they take the tensors' precision, float32 at least."""
    _refuse_mismatch(sources, {k: np.shape(v) for k, v in tensors.items()})
    variables = dict(nnx.to_flat_state(nnx.state(net)))
    for path, source in sources.items():
        value = source.join(*(np.asarray(tensors[name]) for name in source.shapes))
        if jnp.issubdtype(value.dtype, jnp.floating):
            value = value.astype(jnp.promote_types(value.dtype, jnp.float32))
        variables[path] = variables[path].replace(jnp.asarray(value))
    nnx.update(net, nnx.from_flat_state(variables))


def to_reference(
    sources: Mapping[Path, Source], values: Mapping[Path, np.ndarray]
) -> dict[str, np.ndarray]:
    """Arrays by our paths (variables, their gradients) -> by reference name.

    What several variables have of one tensor adds up.
    """
    tensors = {}
    for path, value in values.items():
        for name, array in sources[path].split(np.asarray(value)).items():
            tensors[name] = tensors[name] + array if name in tensors else array
    return tensors


def _plain(name: str, shape: tuple[int, ...]) -> Source:
    """A vector, a Linear kernel (in, out) or a Conv kernel (kh, kw, in, out)."""
    to_theirs = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}[len(shape)]
    to_ours = np.argsort(to_theirs)
    return Source(
        {name: tuple(shape[axis] for axis in to_theirs)},
        lambda tensor: tensor.transpose(to_ours),
        lambda value: {name: value.transpose(to_theirs)},
    )


def _edges(name: str, layer: Expander) -> Source:
    def join(mask):
        taps = _to_pairs(mask != 0).reshape(-1, layer.in_channels * layer.out_channels)
        if (taps != taps[0]).any():
            raise ImportMismatch(f"{name}: the mask differs between kernel taps")
        edges = np.flatnonzero(taps[0]).astype(np.int32)
        if len(edges) != layer.num_edges:
            raise ImportMismatch(
                f"{name}: {len(edges)} connections, but {layer.sampling} sampling of "
                f"degree {layer.degree} in {layer.in_channels} -> "
                f"{layer.out_channels} makes {layer.num_edges}"
            )
        return edges

    def split(edges):
        return {
            name: _from_pairs(np.ones(_taps(layer) + edges.shape, bool), edges, layer)
        }

    return Source({name: _dense_shape(layer)}, join, split)


def _compact(name: str, mask_name: str, layer: Expander) -> Source:
    edges_of = _edges(mask_name, layer).join
    return Source(
        dict.fromkeys((name, mask_name), _dense_shape(layer)),
        lambda weights, mask: _to_pairs(weights)[..., edges_of(mask)],
        lambda values: {name: _from_pairs(values, layer.edges[...], layer)},
    )


def _taps(layer: Expander) -> tuple[int, ...]:
    return layer.kernel.get_value().shape[:-1]


def _dense_shape(layer: Expander) -> tuple[int, ...]:
    return (layer.out_channels, layer.in_channels, *_taps(layer))


def _to_pairs(tensor: np.ndarray) -> np.ndarray:
    """(O, I, taps...) -> (taps..., I * O)."""
    return np.moveaxis(tensor, (1, 0), (-2, -1)).reshape(*tensor.shape[2:], -1)


def _from_pairs(values: np.ndarray, edges, layer: Expander) -> np.ndarray:
    """values (taps..., E) -> (O, I, taps...), zero where no connection exists."""
    pairs = np.zeros(
        (*_taps(layer), layer.in_channels, layer.out_channels), values.dtype
    )
    pairs.reshape(*_taps(layer), -1)[..., np.asarray(edges)] = values
    return np.moveaxis(pairs, (-1, -2), (0, 1))


def _refuse_mismatch(sources, shapes: Mapping[str, tuple[int, ...]]) -> None:
    expected = {
        name: shape
        for source in sources.values()
        for name, shape in source.shapes.items()
    }
    missing = [name for name in expected if name not in shapes]
    unexpected = [name for name in shapes if name not in expected]
    misshaped = [
        f"{name} {shapes[name]}, expected {shape}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "misshaped": misshaped}
    lines = [f"{kind}: {', '.join(names)}" for kind, names in kinds.items() if names]
    if lines:
        raise ImportMismatch("tensors do not fit the net\n  " + "\n  ".join(lines))

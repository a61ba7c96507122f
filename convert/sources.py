"""Conversion between reference tensors and the variables of a net.

Each of our variables lists the tensors that determine it. A one-to-one mapping is not
enough: a mask determines an expander's edges and also which weights its kernel stores,
and a stacked kernel holds the weights of many reference layers.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nets.layers.expander import Connectivity, Expander

Path = tuple[str | int, ...]

# Our variables of a layer -> the tensors of Torch and PyTorch.
TORCH_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
    "edges": "mask",  # as in X-Nets, also for expander variants without an original
}


class Mismatch(ValueError):
    """Reference tensors that do not fit the net; the message lists all of them."""


class Source(NamedTuple):
    """The reference tensors that determine one variable.

    shapes: {name: shape in the reference layout}.
    join: (these tensors, in this order) -> the variable.
    split: the inverse, also for gradients and statistics: variable -> {name: array}.
      Entries that other variables determine are zero.
    """

    shapes: dict[str, tuple[int, ...]]
    join: Callable[..., np.ndarray]
    split: Callable[[np.ndarray], dict[str, np.ndarray]]


def _same_size(tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return tensor.reshape(shape) if tensor.size == math.prod(shape) else tensor


class Reference(NamedTuple):
    """A network of an original code, and its conversion to ours.

    net: our class.
    section: reference configuration -> our `net` section.
    sources: net of that class -> {path of a variable: its source}. The mode of the net
      (train or eval) matters if the original stores statistics differently.
    refine: (section, tensor names) -> section, with the fields that the reference
      configuration leaves open but the names decide.
    order: for originals whose files have no names: name of a layer -> its rank in the
      file.
    layout: for the same originals: (tensor of the file, our reference shape) -> the
      tensor in that shape, or unchanged if it does not fit.
    """

    net: type[nnx.Module]
    section: Callable[[Mapping], dict]
    sources: Callable[[nnx.Module], dict[Path, Source]]
    refine: Callable[[dict, Collection[str]], dict] = lambda section, names: section
    order: Callable[[str], Any] | None = None
    layout: Callable[[np.ndarray, tuple[int, ...]], np.ndarray] = _same_size


def empty(build: Callable[[], nnx.Module]) -> nnx.Module:
    """Builds a module with zeros in all variables, without compiling anything."""
    graphdef, state = nnx.split(nnx.eval_shape(build))

    def zeros(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):  # of dropout
            return jnp.broadcast_to(jax.random.key(0), x.shape)
        return jax.device_put(np.zeros(x.shape, x.dtype))

    return nnx.merge(graphdef, jax.tree.map(zeros, state))


def by_layer(
    net: nnx.Module, name: Callable[[Path, nnx.Module], str]
) -> dict[Path, Source]:
    """Returns the sources of a net whose layers correspond one to one to the reference.

    name: (path of a variable, its layer) -> name of the reference tensor.
    The reference layouts are OIHW and OI. The mask of an expander, from which its
    `edges` follow, has the shape of its weights.
    """
    sources = {}
    for path, shape, module in _variables(net):
        if not isinstance(module, Expander):
            sources[path] = _plain(name(path, module), shape)
        elif path[-1] == "edges":
            sources[path] = _edges(name(path, module), module)
        else:
            mask_name = name((*path[:-1], "edges"), module)
            sources[path] = _compact(name(path, module), mask_name, module)
    return sources


def own(net: nnx.Module) -> dict[Path, Source]:
    """Returns the sources of a net with our names and layouts.

    A name is the path of a variable, such as "blocks.0.2.conv1.kernel".
    """
    return {
        path: _own(".".join(map(str, path)), shape, module)
        for path, shape, module in _variables(net)
    }


def _own(name: str, shape: tuple[int, ...], layer: nnx.Module) -> Source:
    def join(tensor):
        if not name.endswith("edges"):
            return tensor
        pairs, kind = layer.in_channels * layer.out_channels, tensor.dtype.kind
        ascending = kind in "iu" and (np.diff(tensor.astype(np.int64)) > 0).all()
        if not ascending or tensor.min() < 0 or tensor.max() >= pairs:
            raise Mismatch(f"{name}: expected ascending numbers from 0 to {pairs - 1}")
        return tensor.astype(np.int32)

    return Source({name: shape}, join, lambda value: {name: value})


def _variables(net: nnx.Module) -> Iterator[tuple[Path, tuple[int, ...], nnx.Module]]:
    """Yields path, shape and layer of each variable of a net that tensors determine."""
    modules = dict(nnx.iter_modules(net))
    kinds = nnx.Any(nnx.Param, nnx.BatchStat, Connectivity)
    for path, variable in nnx.to_flat_state(nnx.state(net, kinds)):
        yield path, variable.get_value().shape, modules[path[:-1]]


def tensor_shapes(sources: Mapping[Path, Source]) -> dict[str, tuple[int, ...]]:
    """Returns {name: shape in the reference layout} of all tensors of some sources."""
    return {k: v for source in sources.values() for k, v in source.shapes.items()}


def by_position(
    sources: Mapping[Path, Source], reference: Reference, tensors: Mapping
) -> dict[str, np.ndarray]:
    """Renames tensors that are named by position, such as "7.3.weight".

    Raises Mismatch if the file does not have as many layers as the net.
    """
    expected = _layers(tensor_shapes(sources))
    given = _layers(tensors)
    if len(given) != len(expected):
        raise Mismatch(
            f"{len(given)} layers with weights, but the net has {len(expected)}"
        )
    names, named = sorted(expected, key=reference.order), {}
    for name, leaves in zip(names, given.values(), strict=True):
        for leaf, tensor in leaves.items():
            shape = expected[name].get(leaf, tensor.shape)
            named[f"{name}.{leaf}"] = reference.layout(tensor, shape)
    return named


def _layers(tensors: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Groups {'1.2.weight': x} as {'1.2': {'weight': x}}, in the same order."""
    layers = {}
    for name, value in tensors.items():
        layer, _, leaf = name.rpartition(".")
        layers.setdefault(layer, {})[leaf] = value
    return layers


def assign(
    net: nnx.Module, sources: Mapping[Path, Source], tensors: Mapping[str, np.ndarray]
) -> None:
    """Sets the variables of a net to the precision of the tensors, at least float32.

    Raises Mismatch and changes nothing if the tensors do not fit.
    """
    _check_fit(sources, {k: np.shape(v) for k, v in tensors.items()})
    variables = dict(nnx.to_flat_state(nnx.state(net)))
    for path, source in sources.items():
        value = source.join(*(np.asarray(tensors[name]) for name in source.shapes))
        dtype = value.dtype
        if jnp.issubdtype(dtype, jnp.floating):
            dtype = jnp.promote_types(dtype, jnp.float32)
        # jnp.asarray would compile a program for each shape. device_put may alias its
        # argument; astype makes a copy.
        value = jax.device_put(value.astype(dtype))
        variables[path] = variables[path].replace(value)
    nnx.update(net, nnx.from_flat_state(variables))


def to_reference(
    sources: Mapping[Path, Source], values: Mapping[Path, np.ndarray]
) -> dict[str, np.ndarray]:
    """Converts {path: variable, gradient or statistic} to {reference name: array}.

    Adds the contributions of several variables to one tensor. The parity tests compare
    gradients and statistics with recordings in this form.
    """
    tensors = {}
    for path, value in values.items():
        for name, array in sources[path].split(np.asarray(value)).items():
            tensors[name] = tensors[name] + array if name in tensors else array
    return tensors


def _plain(name: str, shape: tuple[int, ...]) -> Source:
    """Returns the source of a vector, or of a Linear or Conv kernel."""
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
            raise Mismatch(f"{name}: the mask differs between kernel taps")
        edges = np.flatnonzero(taps[0]).astype(np.int32)
        if len(edges) != layer.num_edges:
            raise Mismatch(
                f"{name}: the mask has {len(edges)} connections, but an expander of "
                f"{layer.in_channels} -> {layer.out_channels} channels, degree "
                f"{layer.degree} and sampling {layer.sampling!r} has {layer.num_edges}"
            )
        return edges

    split = lambda edges: {name: _from_pairs(np.True_, edges, layer)}
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
    """Reshapes (O, I, taps...) to (taps..., I * O)."""
    return np.moveaxis(tensor, (1, 0), (-2, -1)).reshape(*tensor.shape[2:], -1)


def _from_pairs(values: np.ndarray, edges, layer: Expander) -> np.ndarray:
    """Scatters values (taps..., E), or one, to (O, I, taps...), elsewhere zero."""
    pairs = np.zeros(
        (*_taps(layer), layer.in_channels, layer.out_channels), values.dtype
    )
    pairs.reshape(*_taps(layer), -1)[..., np.asarray(edges)] = values
    return np.moveaxis(pairs, (-1, -2), (0, 1))


def _check_fit(sources, shapes: Mapping[str, tuple[int, ...]]) -> None:
    expected = tensor_shapes(sources)
    kinds = {
        "missing": [name for name in expected if name not in shapes],
        "unexpected": [name for name in shapes if name not in expected],
        "misshaped": [
            f"{name} {shapes[name]}, expected {shape}"
            for name, shape in expected.items()
            if shapes.get(name, shape) != shape
        ],
    }
    lines = [f"{kind}: {', '.join(names)}" for kind, names in kinds.items() if names]
    if lines:
        raise Mismatch("tensors do not fit the net\n  " + "\n  ".join(lines))

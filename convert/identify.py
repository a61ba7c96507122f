"""Finds the net whose weights a file holds, among the variants of configs/."""

import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

import convert
import nets
from convert.sources import empty
from data_sources.errors import some
from runtime.command_line import CONFIGS, SHARED
from runtime.workdir import flatten

# Endings of the names of tensors that are not trained; the last in each line is ours.
MEANS = "running_mean", "moving_mean", "gmean", ".mean"
VARIANCES = "running_var", "moving_var", "gvar", ".var"
GRAPHS = "mask", ".edges"
NOT_TRAINED = (*MEANS, *VARIANCES, *GRAPHS)


class Unidentified(ValueError):
    """Tensors that do not fit, are not finite, or belong to no known net."""


class Match(NamedTuple):
    """A net with the tensors of a file.

    name: the configuration as a value of --config. others: configurations of the same
    net for other data sets.
    """

    name: str
    config: ConfigDict
    net: nnx.Module
    others: tuple[str, ...] = ()


def check(tensors: Mapping[str, np.ndarray]) -> None:
    """Raises Unidentified unless weights are finite and masks are zeros and ones."""
    for name, tensor in tensors.items():
        dtype = tensor.dtype
        if name.endswith("mask"):
            number = jnp.issubdtype(dtype, np.number) or dtype.kind == "b"
            if not number or not np.all((tensor == 0) | (tensor == 1)):
                raise Unidentified(f"{name} has values other than 0 and 1")
        elif not name.endswith(".edges"):  # which loading checks
            if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize > 8:
                raise Unidentified(
                    f"{name} has type {dtype}, but weights must be floats of at most "
                    "64 bits"
                )
            with np.errstate(over="ignore"):
                finite = np.isfinite(tensor.astype(np.float32)).all()
            if not finite:
                raise Unidentified(f"{name} has values that are not finite in float32")
            if name.endswith(VARIANCES) and (tensor < 0).any():
                raise Unidentified(f"{name} has negative variances")


def identify(
    tensors: Mapping[str, np.ndarray], given: tuple[str, ConfigDict] | None = None
) -> Match:
    """Returns the net of some tensors.

    given: the name and configuration to use; without it, tries all variants. Raises
    Unidentified if the tensors do not fit; the message names a variant that does.
    """
    check(tensors)
    count = count_parameters(tensors)
    if given:
        name, config = given
        net, reason = _fit(config, tensors)
        if net is not None:
            return Match(name, config, net)
    match = near = None
    for candidate, variant in candidates(count):
        if match is None:
            found, misfit = _fit(variant, tensors)
            match = found and Match(candidate, variant, found)
            near = near or (candidate, misfit)
        elif variant.net == match.config.net:
            match = match._replace(others=(*match.others, candidate))
    if match and not given:
        return match
    if match:
        raise Unidentified(
            f"the tensors do not fit {name}, they have "
            f"{_differences(match.config, config)}: use --config={match.name}"
        )
    if given or near:
        name, reason = (name, reason) if given else near
        raise Unidentified(
            f"the tensors ({count:,} parameters) do not fit {name}: {reason}"
        )
    nearest, parameters, _ = min(variants(), key=lambda x: abs(x[1] - count))
    raise Unidentified(
        f"no variant in configs/ has these {count:,} parameters "
        f"({some([*tensors], 3)}); the nearest, {nearest}, has {parameters:,}: give it "
        "as --config to see what differs, or another one with --config.net.FIELD=VALUE"
    )


def count_parameters(tensors: Mapping[str, np.ndarray]) -> int:
    """Counts parameters as our nets store them, without those that a mask removes."""
    count = 0
    for name, tensor in tensors.items():
        layer, _, leaf = name.rpartition(".")
        mask = None if leaf == "bias" else tensors.get(f"{layer}.mask")
        if not name.endswith(NOT_TRAINED):
            count += tensor.size if mask is None else int(np.count_nonzero(mask))
    return count


def candidates(count: int) -> Iterator[tuple[str, ConfigDict]]:
    """Yields name and configuration of the variants with this many parameters."""
    for name, parameters, get_config in variants():
        if parameters == count:
            yield name, get_config()


def variants(recipe: str = "") -> Iterator[tuple[str, int, Callable[[], ConfigDict]]]:
    """Yields the name of each variant, its parameters, and what makes its config."""
    suffix = f",{recipe}" if recipe else ""
    for path in sorted(CONFIGS.glob("*.py")):
        if path.stem in SHARED:
            continue
        family = importlib.import_module(f"configs.{path.stem}")
        for variant, row in family.VARIANTS.items():
            for data, parameters in row.parameters.items():
                argument = f"{variant},{data}{suffix}"
                get_config = functools.partial(family.get_config, argument)
                yield f"configs/{path.name}:{argument}", parameters, get_config


def _fit(config: ConfigDict, tensors) -> tuple[nnx.Module | None, str]:
    """Returns the net with the tensors; None and the reason if they do not fit."""
    net = empty(lambda: nets.create(config.net, nnx.Rngs(0)))
    net.eval()  # so that a DelugeNet evaluates like the original
    try:
        convert.load(net, tensors)
    except (convert.Mismatch, convert.UnknownReference) as error:
        reason = str(error).removeprefix("tensors do not fit the net")
        reason = " ".join(reason.split())
        return None, reason if len(reason) <= 300 else f"{reason[:300]}..."
    return net, ""


def _differences(config: ConfigDict, other: ConfigDict) -> str:
    fields, others = flatten(config), flatten(other)
    if fields["net.name"] != others["net.name"]:
        return f"net.name={fields['net.name']!r} (not {others['net.name']!r})"
    different = [
        f"{field}={value!r} (not {others.get(field)!r})"
        for field, value in fields.items()
        if field.startswith("net.") and value != others.get(field)
    ]
    return ", ".join(different)

"""Exports a trained net as weights or as a portable program, with a model card."""

import contextlib
import json
import os
import pathlib
import platform
import shlex
from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import export as jax_export
from ml_collections import ConfigDict

import augment
import convert
import metrics
import nets
import train
from configs import common
from convert import identify
from convert.containers import Normalization, npz, safetensors
from convert.sources import to_reference
from input_pipeline import Facts
from nets import cost
from runtime.checkpoints import Checkpoints
from runtime.checks import NEEDS, check_fields, has_effect
from runtime.workdir import (
    CONFIG_JSON,
    PATHS,
    flatten,
    load_config,
    load_facts,
    read_rows,
    write_text,
)

SUFFIXES = {
    ".npz": "weights",
    ".safetensors": "weights",
    ".jax": "program (StableHLO, by jax.export)",
}
PLATFORMS = ("cpu", "cuda", "tpu")
MARK = "<!-- Written by python -m convert. -->"  # first line of a model card
# Fields that do not belong to the recipe.
NO_RECIPE = (
    *("train.log_every_steps", "train.tensorboard", "train.profile_steps"),
    *("train.compilation_cache", "train.steps_per_dispatch"),
)


class ExportError(ValueError):
    """A file that cannot be written, or is of an unknown kind."""


class Run(NamedTuple):
    """A trained net and where it comes from. step: of its checkpoint."""

    workdir: pathlib.Path
    config: ConfigDict
    facts: Facts
    net: nnx.Module
    step: int


def export(
    workdir: str | os.PathLike,
    path: str | os.PathLike,
    *,
    names: str = "ours",
    which: str | int = "best",
) -> list[pathlib.Path]:
    """Writes the net of a workdir to a file, and a model card to README.md next to it.

    path: its suffix, one of SUFFIXES, decides the kind of file.
    names: of weights, with their layouts: 'ours' (paths of variables) or 'original'.
    which: 'best', 'last' or the step of a checkpoint.
    Returns the paths of both files. Raises ValueError (ExportError and WorkdirError are
    subclasses) if the run cannot be read or the files cannot be written.
    """
    path = pathlib.Path(os.path.expanduser(path))
    card = path.with_name("README.md")
    _check(path, card, names)
    run = load(workdir, which)
    if path.suffix == ".jax":
        content = program(run.net, run.config, run.facts)
    else:
        writer = npz if path.suffix == ".npz" else safetensors
        normalization = Normalization(run.facts.mean, run.facts.std)
        content = writer.write(tensors(run.net, names), normalization)
    text = describe(run, path.name, names)
    draft = path.with_name(f".{path.name}.draft")
    is_new = not path.parent.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(content)
        write_text(card, text)
        draft.replace(path)
    except OSError as error:
        raise ExportError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):  # not a directory, or not empty
            draft.unlink(missing_ok=True)
            if is_new:
                path.parent.rmdir()
    return [path, card]


def _check(path: pathlib.Path, card: pathlib.Path, names: str) -> None:
    if path.suffix not in SUFFIXES:
        raise ExportError(f"{path} must end in {', '.join(SUFFIXES)}")
    if names not in ("ours", "original"):
        raise ExportError(f"unknown names {names!r}: choose ours or original")
    if path.suffix == ".jax" and names == "original":
        raise ExportError("--names=original is for weights, a program has no names")
    if card.exists() and not card.read_text(errors="replace").startswith(MARK):
        raise ExportError(
            f"{card} exists and is not a model card: export to another directory"
        )


def load(workdir: str | os.PathLike, which: str | int = "best") -> Run:
    """Loads the net of a checkpoint, in eval mode."""
    workdir = pathlib.Path(os.path.expanduser(workdir))
    config, facts = load_config(workdir), load_facts(workdir)
    check_fields(config)  # of a run of another version
    with Checkpoints(workdir, config.checkpoint.keep) as checkpoints:
        step = {"step": np.zeros((), np.int32)}
        _, number = checkpoints.restore(step, which, partial=True)
    net, _ = train.restore(workdir, number)
    return Run(workdir, config, facts, net, number)


def tensors(net: nnx.Module, names: str = "ours") -> dict[str, np.ndarray]:
    """Returns the variables of a net with our names, or the original's and its layouts.

    Expanders have dense weights and masks in the original layouts.
    """
    try:
        sources = convert.own(net) if names == "ours" else convert.find_sources(net)
    except convert.UnknownReference as error:
        raise ExportError(f"this net has no original names: {error}") from error
    variables = dict(nnx.to_flat_state(nnx.state(net)))
    values = {path: np.asarray(variables[path].get_value()) for path in sources}
    found = to_reference(sources, values)
    return {name: np.ascontiguousarray(tensor) for name, tensor in found.items()}


def program(net: nnx.Module, config: ConfigDict, facts: Facts) -> bytes:
    """Returns the serialised program from images (N, H, W, 3) uint8 to float32 logits.

    It holds the weights and the normalisation. N is symbolic: any number of images.
    """
    # The other lowerings depend on the platform or on the number of images.
    nets.configure(net, lowering="native")
    definition, variables = nets.split(net)

    @jax.jit
    def logits(images):
        dtype = jnp.dtype(config.train.dtype)
        x = augment.normalize(images, facts.mean, facts.std, dtype)
        return definition.apply(variables, x)[0]

    (count,) = jax_export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((count, *facts.image_shape), jnp.uint8)
    return bytes(jax_export.export(logits, platforms=PLATFORMS)(images).serialize())


def describe(run: Run, name: str, names: str = "ours") -> str:
    """Returns the model card of an exported file, as Markdown; all from the workdir."""
    config, facts = run.config, run.facts
    table = "\n".join(f"| {key} | {value} |" for key, value in _facts(run).items())
    classes = ", ".join(facts.class_names) if any(facts.class_names) else "unknown"
    return (
        f"{MARK}\n# {config.net.name} for {config.data.name}\n\n"
        f"| | |\n|---|---|\n{table}\n\n"
        f"## Training\n\n```\n{command(config)}\n```\n\n"
        f"## Use\n\n{_use(name, names, facts)}\n\n## Classes\n\n{classes}\n"
    )


def _facts(run: Run) -> dict[str, str]:
    config, facts = run.config, run.facts
    net = config.net.to_dict()
    wiring = net.pop("wiring")
    used = [x.removeprefix("net.wiring.") for x in NEEDS if has_effect(config, x)]
    used = [f"{x}={wiring[x]}" for x in used if x in wiring]
    counts = cost.total(cost.of(config.net, facts.image_shape))
    fields = {k: v for k, v in net.items() if k not in ("name", "lowering", "remat")}
    off = flatten(common.base())
    recipe = {
        k: v
        for k, v in flatten(config).items()
        if (k.startswith("augment.") and v != off.get(k))
        or (k.startswith(("optimizer.", "train.")) and k not in NO_RECIPE and v)
    }
    recipe = {k: v for k, v in recipe.items() if has_effect(config, k)}
    recipe |= {f"data.{k}": config.data[k] for k in ("crop", "pad", "border", "flip")}
    origin = _origin(run)
    return {
        "net": f"{config.net.name}: {_listed(fields)}",
        "wiring": " ".join([wiring["kind"], *used]),
        "parameters": f"{counts.parameters:,} (dense: {counts.dense_parameters:,})",
        "multiply-adds": f"{counts.macs:,} per image (dense: {counts.dense_macs:,})",
        "data": f"{config.data.name}: {facts.num_train:,} training images of "
        f"{'x'.join(map(str, facts.image_shape))}, {facts.num_classes} classes",
        "normalisation": f"(image - mean) / std, mean {_numbers(facts.mean)}, "
        f"std {_numbers(facts.std)}, images 0 to 255",
        "recipe": f"{config.recipe}: {_listed(recipe)}",
        "seeds": f"{config.seed}, of the graphs {config.net.get('graph_seed', 0)}",
        **({"weights from": origin} if origin else {}),
        "result": _result(run),
        "exported with": f"Python {platform.python_version()}, JAX {jax.__version__}, "
        f"Flax {flax.__version__}, NumPy {np.__version__}",
    }


def _origin(run: Run) -> str:
    path = run.workdir / "origin.json"
    if not path.is_file():
        return run.config.init_from
    try:
        origin = json.loads(path.read_text())
        return f"{origin['file']} ({origin['container']}), SHA-256 {origin['sha256']}"
    except (ValueError, TypeError, KeyError) as error:
        raise ExportError(f"{path} is damaged; delete it: {error!r}") from error


def _result(run: Run) -> str:
    rows = read_rows(run.workdir / "metrics.csv")
    found = [row for row in rows if row["step"] == run.step]
    if not found:
        return f"step {run.step}, not evaluated"
    [row] = found
    best = max(rows, key=lambda row: row[metrics.BEST_METRIC])
    rank = f"{'best' if row == best else 'not the best'} of {len(rows)}"
    values = _listed({k: f"{v:.4f}" for k, v in row.items() if k.startswith("test_")})
    last = f"{rows[-1][metrics.BEST_METRIC]:.4f}"
    return (
        f"step {run.step}, epoch {row['epoch']:g}: {values}; {rank} evaluations on the "
        f"test images; the last has {metrics.BEST_METRIC}={last}"
    )


def _listed(fields: dict) -> str:
    return ", ".join(f"{k.rpartition('.')[2]}={v}" for k, v in fields.items())


def _numbers(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{x:.6g}" for x in values) + ")"


def command(config: ConfigDict) -> str:
    """Returns a command that trains a configuration: a variant, and what differs."""
    known = [
        (name, flatten(get_config()))
        for name, _, get_config in identify.variants(config.recipe)
        if name.partition(":")[2].startswith(f"{config.variant},")
    ]
    fields = {k: v for k, v in flatten(config).items() if k not in PATHS}
    choices = [
        (name, [k for k in fields if fields[k] != base.get(k)]) for name, base in known
    ]
    # Of a config file that is not in configs/: the run's own file has every field.
    name, changed = min(choices, key=lambda x: len(x[1]), default=(CONFIG_JSON, []))
    overrides = [shlex.quote(f"--config.{k}={fields[k]}") for k in changed]
    return " ".join(["python main.py", f"--config={name}", *overrides, "--workdir=W"])


def _use(name: str, names: str, facts: Facts) -> str:
    """Returns how to load the file."""
    height, width, _ = facts.image_shape
    if name.endswith(".jax"):
        return (
            "Requires `jax` and `flatbuffers`, on CPU, CUDA or TPU. Contains the "
            "weights and the normalisation.\n\n```python\nimport jax.export\n\n"
            f'program = jax.export.deserialize(open("{name}", "rb").read())\n'
            f"logits = program.call(images)  # (N, {height}, {width}, 3) uint8\n"
            "```"
        )
    is_npz = name.endswith(".npz")
    loader = "numpy.load" if is_npz else "safetensors.numpy.load_file"
    layouts = {
        "ours": "paths of variables of the net in Wirings; kernels are (kh, kw, in, "
        "out), expanders store the connections in `edges` only",
        "original": "those of the original code, with its layouts; expanders are dense "
        "and have a mask",
    }
    return f'`{loader}("{name}")`. Names: {layouts[names]}.'

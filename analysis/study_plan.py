"""Expands a study to its nets, at equal price, and these to ordinary runs."""

import ast
import copy
import dataclasses
import difflib
import functools
import importlib
import itertools
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

import input_pipeline
from analysis import equal_price, study_results
from configs.data_sets import DATA_SETS
from nets import cost
from runtime import checks, command_line
from runtime.workdir import flatten

STUDIES = pathlib.Path(__file__).parents[1] / "configs" / "studies"
EQUAL = ("parameters", "macs", "width")
BACKBONE_FIELDS = ("config", "width", "widths")
CHANGES = ("net", "data", "augment", "train", "optimizer")  # of a wiring


@dataclasses.dataclass(frozen=True)
class Study:
    """The fields of a study.

    claim: what the study tests, and who claims it; the head of table.md.
    backbones: name -> `config`, a value of --config; `width`, the fields of config.net
      for a width of 1, which are multiplied by the width; `widths`, of the reference.
    wirings: name -> changes of the configuration: `net`, or other parts of it to
      compare recipes; and `width` instead of the backbone's, if it widens in other
      fields.
    reference: the wiring to compare with.
    equal: "parameters" or "macs": every other wiring takes the width whose count is
      nearest the reference's; or "width".
    tolerance: largest relative deviation from that count.
    seeds: number of runs of each net, with consecutive seeds and net.graph_seeds, so
      that deviations include those of the random graphs.
    changes: of the configuration of every run.
    columns: of table.md, from study_results.COLUMNS.
    """

    claim: str
    backbones: Mapping[str, Mapping]
    wirings: Mapping[str, Mapping]
    reference: str
    equal: str = "parameters"
    tolerance: float = 0.02
    seeds: int = 3
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    columns: Sequence[str] = tuple(study_results.COLUMNS)

    def __post_init__(self):
        _check_choice("reference", self.reference, self.wirings)
        _check_choice("equal", self.equal, EQUAL)
        for column in self.columns:
            _check_choice("column", column, study_results.COLUMNS)
        if self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {self.seeds}")
        for kind, sections, fields, required in (
            ("backbones", self.backbones, BACKBONE_FIELDS, BACKBONE_FIELDS),
            ("wirings", self.wirings, ("width", *CHANGES), ()),
        ):
            if not sections:
                raise ValueError(f"{kind} must not be empty")
            for name, section in sections.items():
                if not re.fullmatch(r"[\w.+-]+", name):
                    raise ValueError(
                        f"{kind}: {name!r} becomes a directory; use only letters, "
                        "digits and . _ + -"
                    )
                for field in section:
                    _check_choice(f"field of {kind}.{name}", field, fields)
                if missing := [x for x in required if x not in section]:
                    raise ValueError(f"{kind}.{name} lacks {', '.join(missing)}")


@dataclasses.dataclass(frozen=True)
class Contestant:
    """One net of a study.

    config: of its first seed. The other fields are those of study_results.Row.
    """

    backbone: str
    wiring: str
    width: int
    reference_width: int
    config: ConfigDict
    parameters: int
    macs: int
    remainder: float
    published: float | None

    @property
    def run(self) -> str:
        return f"{self.backbone}-{self.wiring}-{self.width}"


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a study, with an ordinary configuration."""

    contestant: Contestant
    config: ConfigDict
    workdir: pathlib.Path

    @property
    def name(self) -> str:
        return f"{self.contestant.run}/{self.workdir.name}"


def load(argument: str) -> Study:
    """Returns the study of FILE.py or FILE.py:FORM. Raises ValueError if it is bad."""
    path = pathlib.Path(argument.partition(":")[0])
    if not path.is_file():
        files = sorted(x.name for x in STUDIES.glob("*.py"))
        near = difflib.get_close_matches(path.name, files, n=1)
        hint = f"; did you mean configs/studies/{near[0]}?" if near else ""
        raise ValueError(
            f"{path} does not exist; configs/studies/ has {', '.join(files)}{hint}"
        )
    fields = command_line.load_config_file(argument).to_dict()
    known = [field.name for field in dataclasses.fields(Study)]
    for field in fields:
        _check_choice("field of a study", field, known)
    try:
        return Study(**fields)
    except TypeError as error:  # a missing field
        raise ValueError(f"{argument}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{argument}: {error}") from error


def _check_choice(kind: str, given: str, choices) -> None:
    if given not in choices:
        near = difflib.get_close_matches(str(given), list(choices), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"unknown {kind} {given!r}: choose from {', '.join(choices)}{hint}"
        )


def expand(study: Study, overrides: Sequence[str] = ()) -> list[Contestant]:
    """Returns the nets of a study, the reference of each backbone and width first.

    overrides: flags for every configuration, such as "--config.data.dir=DIR".
    Raises ValueError if a configuration is invalid or an equal price cannot be met.
    """
    return [
        contestant
        for backbone, section in study.backbones.items()
        for width in section["widths"]
        for contestant in _contestants(study, backbone, width, overrides)
    ]


def _contestants(study, backbone, width, overrides) -> list[Contestant]:
    """Returns the nets that are compared with one width of the reference."""
    section = study.backbones[backbone]
    base = command_line.load_config_file(section["config"])
    _update(base, study.changes)
    for override in overrides:
        _override(base, override)
    checks.check_fields(base)
    shape = image_shape(base)
    others = [name for name in study.wirings if name != study.reference]
    found, target = [], None
    for wiring in (study.reference, *others):
        configure = functools.partial(_configure, base, section, study.wirings[wiring])
        count = _counter(configure, shape)
        where = f"{backbone} {wiring}"
        try:
            if target is None or study.equal == "width":
                own = width
            else:
                price = lambda w, count=count: getattr(count(w), study.equal)
                own = equal_price.solve(price, target, width, study.tolerance)
            total = count(own)
        except ValueError as error:
            raise ValueError(
                f"{where} at equal {study.equal} (reference {study.reference}, width "
                f"{width}): {error}; choose other widths of the reference, or raise "
                "the study's tolerance"
            ) from error
        counted = study.equal if study.equal != "width" else "parameters"
        target = target or getattr(total, counted)
        config = configure(own)
        try:
            checks.check_values(config)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        contestant = Contestant(
            backbone=backbone,
            wiring=wiring,
            width=own,
            reference_width=width,
            config=config,
            parameters=total.parameters,
            macs=total.macs,
            remainder=round(getattr(total, counted) / target - 1, 6),
            published=published_error(section["config"], config),
        )
        found.append(contestant)
    return found


def _configure(base: ConfigDict, backbone, wiring, width: int) -> ConfigDict:
    """Returns the configuration of a backbone with a wiring, at a width."""
    config = base.copy_and_resolve_references()
    _update(config, {part: wiring[part] for part in CHANGES if part in wiring})
    unit = wiring.get("width", backbone["width"])
    _update(config, {"net": _scale(unit, width)})
    return config


def _scale(unit: Any, width: int) -> Any:
    """Multiplies all numbers of nested dicts and tuples."""
    if isinstance(unit, Mapping):
        return {name: _scale(value, width) for name, value in unit.items()}
    if isinstance(unit, (tuple, list)):
        return tuple(_scale(value, width) for value in unit)
    return unit * width


def _update(config: ConfigDict, fields: Mapping) -> None:
    try:
        config.update(copy.deepcopy(dict(fields)))
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"the changes {dict(fields)} do not fit: {error}") from error


def _override(config: ConfigDict, flag: str) -> None:
    """Sets the field of a flag such as --config.train.epochs=2."""
    match = re.fullmatch(r"--config\.([^=]+)=(.*)", flag, re.DOTALL)
    if not match:
        raise ValueError(f"unknown flag {flag}; fields are --config.FIELD=VALUE")
    path, text = match.groups()
    command_line.check_path(config, path)
    value, old = text, flatten(config)[path]
    if not isinstance(old, str):
        try:
            value = ast.literal_eval(text)
        except (SyntaxError, ValueError) as error:
            kind = type(old).__name__
            raise ValueError(f"{flag}: expected a value of type {kind}") from error
    for part in reversed(path.split(".")):
        value = {part: value}
    _update(config, value)


def image_shape(config: ConfigDict) -> tuple[int, int, int]:
    """Returns the shape (H, W, 3) of a net's input; loads only unknown data sets."""
    if not input_pipeline.in_memory(config.data):
        size = config.data.image_size
    elif config.data.name in DATA_SETS:
        size = DATA_SETS[config.data.name].image_size
    else:
        return input_pipeline.load(config.data, "test").image_shape
    return size, size, 3


def _counter(configure: Callable, shape) -> Callable[[int], cost.Cost]:
    return functools.cache(
        lambda width: cost.total(cost.of(configure(width).net, shape))
    )


def published_error(config_file: str, config: ConfigDict) -> float | None:
    """Returns the error of the variant with this net, in the same family and data set.

    None if no variant has this net or its error is not published.
    """
    path = pathlib.Path(config_file.partition(":")[0])
    if path.resolve().parent != STUDIES.parent or path.suffix != ".py":
        return None
    family, data = importlib.import_module(f"configs.{path.stem}"), config.data.name
    net = config.net.to_dict() | {"graph_seed": 0}
    for name, variant in family.VARIANTS.items():
        if row := variant.published.get(data):
            other = family.get_config(f"{name},{data}").net.to_dict()
            if _normalize(other) == _normalize(net):
                return row.error
    return None


def _normalize(net: dict) -> dict:
    """Drops the fields of other wirings, which have no effect."""
    config = ConfigDict({"net": net})
    fields = flatten(config).items()
    return {name: x for name, x in fields if checks.has_effect(config, name)}


def make_runs(
    contestants: Sequence[Contestant], seeds: int, workdir: pathlib.Path
) -> list[Run]:
    """Returns the runs, all nets of the first seed first, so that pairs end early."""
    found = []
    for number, contestant in itertools.product(range(seeds), contestants):
        config = contestant.config.copy_and_resolve_references()
        config.seed += number
        config.net.graph_seed += number
        folder = workdir / contestant.run / f"seed{config.seed}"
        found.append(Run(contestant, config, folder))
    return found

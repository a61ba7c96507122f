"""The command line: flags and config files, with one-line errors."""

import difflib
import importlib.util
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Sequence

from absl import flags
from ml_collections import ConfigDict

from runtime.checks import check_effects, check_fields, hint
from runtime.workdir import CONFIG_JSON, flatten, load_config

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"


def parse(argv: Sequence[str]) -> list[str]:
    """Parses the flags, for app.run; exits with a one-line error on bad input.

    ml_collections answers bad overrides with stack traces and KeyErrors, so config file
    and override paths are checked before it sees them.
    """
    help_wanted = any(re.match(r"--?(help|h$|\?)", arg) for arg in argv)
    try:
        if not help_wanted:
            argv = _with_config(argv)
            config = load_config_file(_value(argv, "config"))
            check_fields(config)
            for arg in argv:
                if match := re.match(r"--?(?:no)?config\.([^=]*)", arg):
                    check_path(config, match[1])
            before = flatten(config)
        unused = flags.FLAGS(argv)[1:]
        if unused:
            raise ValueError(f"unexpected argument {unused[0]!r}")
        if "workdir" in flags.FLAGS and flags.FLAGS.workdir is None:
            raise ValueError(
                f"--workdir is missing; {_program(argv)} --help lists the flags"
            )
        if not help_wanted:
            after = flatten(flags.FLAGS.config)
            changed = [field for field in after if after[field] != before.get(field)]
            check_effects(flags.FLAGS.config, changed)
    except flags.IllegalFlagValueError as error:
        sys.exit(f"error: {_explain(str(error))}")
    except (flags.Error, ValueError, TypeError) as error:
        sys.exit(f"error: {error}")
    return argv[:1]


EXPECTED = {  # by what Python or absl says about a value
    "invalid literal for int()": "an integer",
    "could not convert string to float": "a number",
    "Non-boolean argument": "true or false",
}


def _explain(message: str) -> str:
    """Returns an error of absl, "flag --NAME=VALUE: REASON", in plainer words."""
    for words, expected in EXPECTED.items():
        before, found, _ = message.partition(words)
        if found:
            return f"{before.rpartition(': ')[0]}: expected {expected}"
    return message


class ConfigParser(flags.ArgumentParser):
    """Parses the value of --config, as load_config_file does."""

    def parse(self, argument: str) -> ConfigDict:
        return load_config_file(argument).lock()


def _with_config(argv: Sequence[str]) -> Sequence[str]:
    """Adds --config=WORKDIR/config.json if --config is missing and the file exists."""
    if _value(argv, "config") is not None:
        return argv
    given, remedy = _value(argv, "workdir"), f"{_program(argv)} --help lists the flags"
    if given is None and "workdir" not in flags.FLAGS:
        raise ValueError(f"--config is missing; {remedy}")
    workdir = pathlib.Path(os.path.expanduser(given or "."))
    path = workdir / CONFIG_JSON
    if not path.is_file():
        seeds = sorted(str(x.parent) for x in workdir.glob(f"seed*/{CONFIG_JSON}"))
        hint = f" (--workdir may be one of {', '.join(seeds)})" if seeds else ""
        raise ValueError(
            f"--config is missing, and {path} of an earlier run does not exist{hint}; "
            f"{remedy}"
        )
    return [argv[0], f"--config={path}", *argv[1:]]


def _program(argv: Sequence[str]) -> str:
    """Returns the command as typed; python -m puts an absolute path into argv[0]."""
    path, root = pathlib.Path(argv[0]), CONFIGS.parent
    if path.parent == root or not path.is_relative_to(root):
        return argv[0]
    return f"python -m {'.'.join(path.relative_to(root).with_suffix('').parts)}"


def _value(argv: Sequence[str], flag: str) -> str | None:
    """Returns the last value given to a flag, or None."""
    value = None
    for i, arg in enumerate(argv):
        if match := re.fullmatch(rf"--?{flag}(?:=(.*))?", arg, re.DOTALL):
            value = match[1] if match[1] is not None else "".join(argv[i + 1 : i + 2])
    return value


def load_config_file(value: str) -> ConfigDict:
    """Returns get_config(ARGUMENT) of a 'FILE.py' or 'FILE.py:ARGUMENT'.

    Or the configuration in a config.json. Raises ValueError for a file that cannot be
    loaded or that returns no ConfigDict.
    """
    path, colon, argument = value.partition(":")
    if not os.path.isfile(path):
        files = sorted(x.name for x in CONFIGS.glob("*.py") if x.stem not in SHARED)
        near = difflib.get_close_matches(os.path.basename(path), files, n=1)
        ours = min(os.path.relpath(CONFIGS), str(CONFIGS), key=len)
        hint = f"; did you mean {ours}/{near[0]}?" if near else ""
        kind = "is not a regular file" if os.path.exists(path) else "does not exist"
        if os.path.isdir(path):
            kind = "is a directory"
        raise ValueError(
            f"--config: {path or 'the file'} {kind}; {ours}/ has {', '.join(files)}"
            + hint
        )
    if path.endswith(".json") and not colon:
        return load_config(path)
    if not path.endswith(".py"):
        raise ValueError(
            f"--config={path} is not a Python file; it must end in .py and define "
            "get_config(), or be the config.json of a workdir"
        )
    spec = importlib.util.spec_from_file_location("config", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        get_config = module.get_config
        config = get_config(argument) if colon else get_config()
    except ValueError as error:
        raise ValueError(f"--config={value}: {error}") from error
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [
            f", line {x.lineno}" for x in frames if x.filename == os.path.abspath(path)
        ]
        where = lines[-1] if lines else ""
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"--config={value} cannot be loaded{where}: {reason}"
        ) from error
    if not isinstance(config, ConfigDict):
        kind = type(config).__name__
        raise ValueError(
            f"--config={value}: get_config() must return a ConfigDict, not {kind}"
        )
    return config


SHARED = ("__init__", "common", "data_sets")  # in configs/, but no families


def check_path(config: ConfigDict, path: str) -> None:
    """Raises ValueError unless `path` ('train.batch_size') names a field of config."""
    flag = f"--config.{path}"
    if "[" in path:
        field = path.partition("[")[0]
        raise ValueError(
            f"{flag}: items cannot be set one by one; set the whole field {field}=(...)"
        )
    node, parts = config, path.split(".")
    for depth, part in enumerate(parts):
        above = ".".join(parts[:depth])
        if not isinstance(node, ConfigDict):
            raise ValueError(
                f"{flag}: {above} is of type {type(node).__name__} and has no "
                "sub-fields; set it as a whole"
            )
        if part not in node:
            near = hint(path, flatten(config), "--config.")
            raise ValueError(f"{flag}: there is no field {part!r}{near}")
        node = node[part]
    if isinstance(node, ConfigDict):
        fields = ", ".join(f"{path}.{name}" for name in node)
        raise ValueError(f"{flag} is a section; set one of its fields: {fields}")

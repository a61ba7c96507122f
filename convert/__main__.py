"""Converts weight files and runs into each other; docs/weights.md lists the formats.

python -m convert FILE --workdir=W    from a weight file to a workdir
python -m convert W --to=FILE         from a workdir to weights or a program
"""

import ast
import pathlib
import re
import sys

from runtime import processes

if __name__ == "__main__":
    processes.set_environment()  # before jax is imported

import argparse

from ml_collections import ConfigDict

from convert import containers, export, identify, workdirs
from runtime import command_line
from runtime.checks import check_values
from runtime.workdir import resolve

DEFAULTS = "ours", "best"  # of --names and --checkpoint


def main(arguments: list[str]) -> None:
    """Runs the command; exits with a one-line error if it cannot."""
    try:
        options, overrides = _parser().parse_known_args(arguments)
        if options.to is None:
            import_file(options, overrides)
        else:
            export_run(options, overrides)
    except (ValueError, OSError, MemoryError) as error:
        sys.exit(f"error: {error or type(error).__name__}")


def import_file(options: argparse.Namespace, overrides: list[str]) -> None:
    """Writes the workdir of a weight file, whose net its names and shapes decide."""
    if options.file.is_dir():
        raise ValueError(f"{options.file} is a directory: to export a run, set --to")
    if (options.names, options.checkpoint) != DEFAULTS:
        raise ValueError("--names and --checkpoint require --to")
    if options.workdir is None and not options.dry_run:
        raise ValueError("--workdir is missing; python -m convert --help")
    given = _config(options.config, overrides)
    weights = containers.read(options.file)
    try:
        match = identify.identify(weights.tensors, given)
    except identify.Unidentified as error:
        raise ValueError(f"{options.file}: {error}") from error
    print(_describe(options.file, weights, match))
    if options.dry_run:
        return
    workdir = resolve(options.workdir)
    workdirs.save(workdir, options.file.expanduser(), weights, match)
    print(
        f"saved          {workdir}\n"
        f"evaluate       python main.py --mode=eval --workdir={workdir}\n"
        f"fine-tune      python main.py --workdir={workdir}"
    )


def export_run(options: argparse.Namespace, overrides: list[str]) -> None:
    """Writes the net of a workdir to a file, and a model card next to it."""
    imports = [options.workdir, options.dry_run or None, options.config, *overrides]
    if any(value is not None for value in imports):
        raise ValueError(
            "--to cannot be combined with --workdir, --dry-run or --config"
        )
    written = export.export(
        options.file, options.to, names=options.names, which=options.checkpoint
    )
    for path in written:
        print(f"saved          {path}")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(f"{message}; python -m convert --help lists the flags")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        "python -m convert", description=__doc__.partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument(
        "file", type=pathlib.Path, help="a weight file; with --to, a workdir"
    )
    parser.add_argument("--workdir", help="a new directory")
    parser.add_argument(
        "--dry-run", action="store_true", help="say what the file holds, write nothing"
    )
    parser.add_argument(
        "--config",
        help="configs/FAMILY.py:VARIANT,DATA, if the file does not decide it; "
        "--config.FIELD=VALUE changes a field",
    )
    parser.add_argument(
        "--to",
        type=pathlib.Path,
        metavar="FILE",
        help=f"a file to export to: {', '.join(export.SUFFIXES)}",
    )
    parser.add_argument(
        "--names",
        default=DEFAULTS[0],
        choices=["ours", "original"],
        help="of exported weights, with their layouts",
    )
    parser.add_argument(
        "--checkpoint", default=DEFAULTS[1], help="to export: best, last or a step"
    )
    return parser


def _config(value: str | None, overrides: list[str]) -> tuple[str, ConfigDict] | None:
    """Returns the name and the configuration of the command line, if it has one."""
    config = None if value is None else command_line.load_config_file(value)
    for override in overrides:
        match = re.fullmatch(r"--config\.([^=]+)=(.*)", override, re.DOTALL)
        if not match:
            raise ValueError(f"unknown flag {override!r}; see --help")
        if config is None:
            raise ValueError(f"{override} requires --config")
        command_line.check_path(config, match[1])
        try:
            config.update_from_flattened_dict({match[1]: _literal(match[2])})
        except TypeError as error:
            raise ValueError(f"{override}: {error}") from error
    if config is None:
        return None
    check_values(config)
    return " ".join([value, *overrides]), config


def _literal(text: str):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _describe(path: pathlib.Path, weights, match) -> str:
    count = identify.count_parameters(weights.tensors)
    lines = [
        f"file           {path}: {weights.container}, {len(weights.tensors)} tensors",
        f"net            {match.name}, {count:,} parameters",
    ]
    if match.others:
        lines.append(f"same net       {', '.join(match.others)}")
    if weights.skipped:
        more = len(weights.skipped) - 5
        some = ", ".join(weights.skipped[:5]) + (f" and {more} more" * (more > 0))
        lines.append(f"skipped        {some}")
    return "\n".join(lines)


if __name__ == "__main__":
    main(sys.argv[1:])

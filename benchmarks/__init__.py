"""Benchmarks. Each writes tables to results/, named after the machine."""

import csv
import importlib
import os
import pathlib
import pkgutil
import platform

from ml_collections import ConfigDict

import configs

RESULTS = pathlib.Path(__file__).parent / "results"


def machine(device_kind: str, cores: int | None = None) -> str:
    """Returns the machine's part of file names: accelerator, or processor and cores."""
    if device_kind.lower() == "cpu":
        return f"{platform.machine()}-{cores or os.cpu_count()}cores"
    return device_kind.lower().replace(" ", "-")


def get_config(variant: str) -> ConfigDict:
    """Returns the config of FAMILY:VARIANT; raises ValueError with the choices."""
    family, _, row = variant.partition(":")
    modules = [module.name for module in pkgutil.iter_modules(configs.__path__)]
    families = [name for name in modules if hasattr(_module(name), "VARIANTS")]
    if family not in families:
        raise ValueError(
            f"unknown family {family!r} in {variant!r}: choose from "
            f"{', '.join(families)}"
        )
    return _module(family).get_config(row)


def _module(family: str):
    return importlib.import_module(f"configs.{family}")


def write(name: str, rows: list[dict]) -> None:
    """Writes results/NAME.csv, or NAME-part.csv if NAME.csv has more rows."""
    path = RESULTS / f"{name}.csv"
    if path.exists() and len(path.read_text().splitlines()) > len(rows) + 1:
        path = RESULTS / f"{name}-part.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {path}")


def merge(name: str, rows: list[dict], key: str) -> None:
    """Writes rows to results/NAME.csv, where they replace rows with the same `key`."""
    path, new = RESULTS / f"{name}.csv", {row[key] for row in rows}
    kept = []
    if path.exists():
        with path.open(newline="") as file:
            kept = [row for row in csv.DictReader(file) if row[key] not in new]
    with path.open("w", newline="") as file:
        columns = dict(restval="", extrasaction="ignore", lineterminator="\n")
        writer = csv.DictWriter(file, list(rows[0]), **columns)
        writer.writeheader()
        writer.writerows([*kept, *rows])
    print(f"wrote {path}")

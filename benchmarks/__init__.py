"""Benchmarks. Each writes tables to results/, named after the machine."""

import csv
import os
import pathlib
import platform
import time
from collections.abc import Callable, Hashable, Mapping

from ml_collections import ConfigDict

from configs import common

RESULTS = pathlib.Path(__file__).parent / "results"
CPU_INFO = pathlib.Path("/proc/cpuinfo")


def machine(device_kind: str, cores: int | None = None) -> str:
    """Returns the machine's part of file names: accelerator, or processor and cores.

    Ratios depend on the width of vectors, so x86-64 without AVX-512 is "x86_64-avx2".
    """
    if device_kind.lower() == "cpu":
        processor = platform.machine()
        if processor == "x86_64" and CPU_INFO.exists():
            processor += "" if "avx512f" in CPU_INFO.read_text() else "-avx2"
        return f"{processor}-{cores or os.cpu_count()}cores"
    return device_kind.lower().replace(" ", "-")


def get_config(variant: str) -> ConfigDict:
    """Returns the config of FAMILY:VARIANT; raises ValueError with the choices."""
    family, _, row = variant.partition(":")
    if family not in common.FAMILIES:
        raise ValueError(
            f"unknown family {family!r} in {variant!r}: choose from "
            f"{', '.join(common.FAMILIES)}"
        )
    return common.load_family(family).get_config(row)


def time_rounds(programs: Mapping[Hashable, Callable], rounds: int) -> dict:
    """Returns the seconds of each program in each of the interleaved rounds."""
    import jax

    seconds = {name: [] for name in programs}
    for _ in range(rounds):
        for name, run in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append(time.perf_counter() - start)
    return seconds


def read(path: pathlib.Path) -> list[dict[str, str]]:
    """Returns the rows of a table; none if the file is missing."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(name: str, rows: list[dict]) -> None:
    """Writes results/NAME.csv, or NAME-part.csv if NAME.csv has more rows."""
    path = RESULTS / f"{name}.csv"
    if len(read(path)) > len(rows):
        path = RESULTS / f"{name}-part.csv"
    _write(path, rows, list(rows[0]))


def merge(name: str, rows: list[dict], key: str) -> None:
    """Writes rows to results/NAME.csv, where they replace rows with the same `key`."""
    path, new = RESULTS / f"{name}.csv", {row[key] for row in rows}
    kept = [row for row in read(path) if row[key] not in new]
    _write(path, [*kept, *rows], list(rows[0]))


def _write(path: pathlib.Path, rows: list[dict], columns: list[str]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(
            file, columns, extrasaction="ignore", lineterminator="\n"
        )
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {path}")

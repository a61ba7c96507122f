"""Measurements; each writes one file below results/, named after the machine."""

import csv
import os
import pathlib
import platform

RESULTS = pathlib.Path(__file__).parent / "results"


def machine(device_kind: str, cores: int | None = None) -> str:
    """For file names: the accelerator, or the processor and its cores."""
    kind = device_kind.lower().replace(" ", "-")
    return (
        f"{platform.machine()}-{cores or os.cpu_count()}cores"
        if kind == "cpu"
        else kind
    )


def write(name: str, rows: list[dict]) -> None:
    """The rows as results/NAME.csv; a part of that table as NAME-part.csv beside it."""
    path = RESULTS / f"{name}.csv"
    if path.exists() and len(path.read_text().splitlines()) > len(rows) + 1:
        path = RESULTS / f"{name}-part.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {path}")

"""The config files: name of a family -> its module."""

import importlib
import pathlib

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
FAMILIES = {
    path.stem: importlib.import_module(f"configs.{path.stem}")
    for path in sorted(CONFIGS.glob("*.py"))
    if path.stem not in ("common", "data_sets")
}

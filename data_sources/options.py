"""What config.data says about a data set before it is found."""

import re

from ml_collections import ConfigDict


def in_memory(data: ConfigDict) -> bool:
    """Returns whether images are read into memory, not as photographs from disk.

    Every config.data.crop except "pad" is one of photographs.
    """
    return data.crop == "pad"


def base_name(name: str) -> str:
    """Returns the name of a TFDS data set without configuration and version."""
    return re.split("[:/]", name)[0]


def is_of_recipe(data: ConfigDict) -> bool:
    """Returns whether data.name is the data set that the recipe is made for."""
    npz = data.name.lower().endswith(".npz")  # perhaps in a folder called like the set
    return data.recipe.name == base_name(data.name) != "" and not npz

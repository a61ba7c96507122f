"""Validates config.augment."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from augment import mixing, policies

LARGEST = {
    "randaugment_magnitude": policies.MAX_MAGNITUDE,
    "cutmix_probability": 1,
    "jitter": 1,  # beyond, colours turn into their opposites
}


def check(options: Mapping[str, Any], rows_per_device: int | None = None) -> None:
    """Raises ValueError for invalid options of config.augment.

    rows_per_device: images of a batch on each device, which mixing groups must divide;
      None to check everything else.
    """
    for name, value in options.items():
        for number in value if name == "hls" else [value]:
            if not isinstance(number, (int, float)) or not 0 <= number < math.inf:
                raise ValueError(
                    f"augment.{name}: expected a finite number of at least 0, "
                    f"got {number!r}"
                )
    if len(options["hls"]) not in (0, 3):
        raise ValueError(
            "augment.hls must be (hue, lightness, saturation) or (), "
            f"got {tuple(options['hls'])}"
        )
    for name, largest in LARGEST.items():
        if options[name] > largest:
            raise ValueError(
                f"augment.{name} must be at most {largest:g}, got {options[name]}"
            )
    _at_most_one(options, ("autoaugment", "randaugment_ops"))
    mixings = _at_most_one(options, mixing.NAMES)
    multiple = 4 if options["ricap"] else 2
    if mixings and (rows_per_device or 0) % multiple:
        raise ValueError(
            f"{mixings[0]} mixes images in groups of {multiple}, which do not divide "
            f"the {rows_per_device} images of a device: change train.batch_size, or, "
            "if this is the last batch of an epoch, set train.last_batch=fill"
        )


def _at_most_one(options: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    chosen = [f"augment.{name}" for name in names if options[name]]
    if len(chosen) > 1:
        raise ValueError(f"set only one of {' and '.join(chosen)}")
    return chosen

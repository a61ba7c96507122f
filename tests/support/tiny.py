"""The smallest form of every registered net, for the tests that run over the registry.

A new net needs no entry here: it is tested in the form of its smallest config row. An
entry makes its tests faster: a smaller net, on images of 16 pixels.
"""

import functools

from tests.support.families import FAMILIES

FORMS = {
    "alexnet": dict(image_size=63, hidden=1024, dropout=0.0, batch_norm=True),
    "cfmz_resnet": dict(depth=8),
    "delugenet": dict(layers=(2, 2), width=0.25),
    "densenet": dict(depth=10, growth=8),
    "densenet_imagenet": dict(growth=8, blocks=(1, 2, 1)),
    "igc_resnet": dict(depth=8, width=8),
    "igc_resnet_imagenet": dict(depth=10, width=8),
    "mobilenet": dict(blocks=((64, 1), (128, 2), (128, 2)), width=0.5),
    "plain": dict(depth=5, width=8),
    "gunn": dict(channels=(16, 24), segments=(4, 3)),
    "resnet": dict(depth=8, preactivation=True),
    "vgg": dict(depth=11),
}
# AlexNet and VGG accept no images of 16 pixels.
SMALL_IMAGES = FORMS.keys() - {"alexnet", "vgg"}


def config(name: str, wiring="dense", **fields) -> dict:
    """Returns the `net` section of a small form with 10 classes.

    wiring: a kind, or a whole `wiring` section.
    """
    form = FORMS.get(name) or smallest_row(name)
    wiring = {"kind": wiring} if isinstance(wiring, str) else wiring
    return form | {"name": name, "num_classes": 10, "wiring": wiring} | fields


def image_size(name: str) -> int:
    """Returns the rows and columns of the images that the small form reads."""
    return 16 if name in SMALL_IMAGES else config(name).get("image_size", 32)


@functools.cache
def smallest_row(name: str) -> dict:
    """Returns the net of the row with the fewest parameters; LookupError if none."""
    rows = []
    for family in FAMILIES.values():
        for variant, row in family.VARIANTS.items():
            net = family.get_config(variant).net.to_dict()
            if net["name"] == name:
                rows.append((min(row.parameters.values()), net))
    if not rows:
        raise LookupError(f"net {name!r} has no row in configs/")
    return min(rows, key=lambda row: row[0])[1]

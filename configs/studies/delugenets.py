"""DelugeNets: cross-layer depthwise connections against the same net without them.

python -m analysis.study configs/studies/delugenets.py:small --workdir=/tmp/deluge-small
python -m analysis.study configs/studies/delugenets.py --workdir=/tmp/deluge

Without cross-layer connections, the net is a chain of layers: it has no shortcuts.
No width of the chain is within 2 % of the narrower net 146.
"""

from ml_collections import ConfigDict


def get_config(form: str = "full"):
    if form not in ("small", "full"):
        raise ValueError(f"unknown form {form!r}: choose from small, full")
    study = dict(
        claim="DelugeNets (arXiv 1611.05552): cross-layer depthwise connections beat "
        "the same net without them at equal parameters.",
        backbones=dict(
            delugenet=dict(
                config="configs/delugenets.py:wide-146,cifar10",
                width=dict(width=1 / 32),
                widths=(56,),  # the published net
            ),
        ),
        wirings=dict(
            chain=dict(net=dict(cross_layer=False)),
            cross=dict(net=dict(cross_layer=True)),
        ),
        reference="cross",
        seeds=3,
    )
    if form == "small":
        study["backbones"]["delugenet"]["widths"] = (16,)
        study["changes"] = dict(
            net=dict(layers=(2, 2, 2)),
            train=dict(epochs=0.15, batch_size=32),
            optimizer=dict(schedule="one_cycle", min_learning_rate=0.0),
        )
    return ConfigDict(study)

"""GUNN: gradual against simultaneous updates in the same net.

python -m analysis.study configs/studies/gunn.py:small --workdir=/tmp/gunn-small
python -m analysis.study configs/studies/gunn.py --workdir=/tmp/gunn

Both orders have the same parameters and multiply-adds.
"""

from ml_collections import ConfigDict


def get_config(form: str = "full"):
    if form not in ("small", "full"):
        raise ValueError(f"unknown form {form!r}: choose from small, full")
    study = dict(
        claim="GUNN (arXiv 1711.09280): gradual updates beat simultaneous ones in the "
        "same net.",
        backbones=dict(
            gunn=dict(
                config="configs/gunn.py:15,cifar10",
                width=dict(channels=(20, 25, 30)),
                widths=(12,),
            ),
        ),
        wirings=dict(
            simultaneous=dict(net=dict(order="simultaneous")),
            gradual=dict(net=dict(order="gradual")),
        ),
        reference="simultaneous",
        equal="width",
        seeds=3,
    )
    if form == "small":
        # Few, narrow segments.
        study["backbones"]["gunn"].update(
            width=dict(channels=(4, 5, 6)),
            widths=(8,),
        )
        study["changes"] = dict(
            net=dict(segments=(4, 5, 6)),
            train=dict(epochs=0.25, batch_size=32, batch_norm_groups=1),
            optimizer=dict(schedule="one_cycle", min_learning_rate=0.0),
        )
    return ConfigDict(study)

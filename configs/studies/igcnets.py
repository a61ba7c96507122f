"""IGCNets: regular against interleaved convolutions with different partitions.

python -m analysis.study configs/studies/igcnets.py:small --workdir=/tmp/igc-small
python -m analysis.study configs/studies/igcnets.py --workdir=/tmp/igc

The regular net has width 20 (small form: 16), where all partitions are within 2 % of
its parameters. m2 has M = 2 channels in each primary group of the first stage; the
number of primary groups L is solved. M doubles with the width, as in the paper's nets
for CIFAR.
"""

from ml_collections import ConfigDict


def get_config(form: str = "full"):
    if form not in ("small", "full"):
        raise ValueError(f"unknown form {form!r}: choose from small, full")

    def interleaved(members):
        return dict(
            net=dict(wiring=dict(kind="interleaved", secondary_groups=0)),
            width=dict(width=members, wiring=dict(primary_groups=1)),
        )

    study = dict(
        claim="IGCNets (arXiv 1707.02725): at equal parameters, L24M2 beats the "
        "regular net, and accuracy peaks at an interior number of primary groups.",
        backbones=dict(
            plain=dict(
                config="configs/igcnets.py:plain-20-W16,cifar10",
                width=dict(width=1),
                widths=(20,),
            ),
        ),
        wirings=dict(
            regular=dict(net=dict(wiring=dict(kind="dense"))),
            **{f"m{members}": interleaved(members) for members in (1, 2, 4, 8)},
        ),
        reference="regular",
        seeds=3,
    )
    if form == "small":
        study["backbones"]["plain"]["widths"] = (16,)
        del study["wirings"]["m8"]  # no L is within 2 %
        study["changes"] = dict(
            net=dict(depth=8),
            train=dict(epochs=0.15, batch_size=32, batch_norm_groups=1),
            optimizer=dict(schedule="one_cycle", min_learning_rate=0.0),
        )
    return ConfigDict(study)

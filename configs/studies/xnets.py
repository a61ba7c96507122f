"""X-Nets: expander, grouped and dense DenseNets at equal parameters.

python -m analysis.study configs/studies/xnets.py:small --workdir=/tmp/xnets-small
python -m analysis.study configs/studies/xnets.py --workdir=/tmp/xnets

At equal parameters, the dense contestant is the narrower dense net of the second claim.
"""

from ml_collections import ConfigDict


def get_config(form: str = "full"):
    if form not in ("small", "full"):
        raise ValueError(f"unknown form {form!r}: choose from small, full")
    study = dict(
        claim="X-Nets (arXiv 1711.08757): at equal parameters, an expander beats a "
        "grouped layer, and a wide expander net equals a narrower dense one.",
        backbones=dict(
            densenet=dict(
                config="configs/xdensenet.py:40-24-2,cifar10",
                width=dict(growth=1),
                widths=(24, 48),
            ),
        ),
        wirings=dict(
            expander=dict(net=dict(wiring=dict(kind="expander", compress=2))),
            grouped=dict(net=dict(wiring=dict(kind="grouped", groups=2))),
            dense=dict(net=dict(wiring=dict(kind="dense"))),
        ),
        reference="expander",
        seeds=3,
        changes=dict(net=dict(wired_transitions=True)),
    )
    if form == "small":
        study["backbones"]["densenet"]["widths"] = (14,)
        study["changes"] = dict(
            net=dict(wired_transitions=True, depth=16),
            train=dict(epochs=0.15, batch_size=32),
            optimizer=dict(schedule="one_cycle", min_learning_rate=0.0),
        )
    return ConfigDict(study)

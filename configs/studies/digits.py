"""Wirings of a small DenseNet on embedded data; the example of a study.

python -m analysis.study configs/studies/digits.py --workdir=/tmp/digits

Begin your own study with a copy of this file. analysis/study_plan.py explains the
fields.
"""

from ml_collections import ConfigDict


def get_config(form: str = ""):
    if form:
        raise ValueError(f"this study has only one form, got {form!r}")
    study = dict(
        claim="Does a small DenseNet need dense connections to classify digits?",
        backbones=dict(
            densenet=dict(
                config="configs/xdensenet.py:22-8-2,digits",
                width=dict(growth=1),
                widths=(14,),
            ),
        ),
        wirings=dict(
            expander=dict(net=dict(wiring=dict(kind="expander", compress=2))),
            grouped=dict(net=dict(wiring=dict(kind="grouped", groups=2))),
            dense=dict(net=dict(wiring=dict(kind="dense"))),
        ),
        reference="expander",
        equal="parameters",
        seeds=3,
        changes=dict(
            net=dict(depth=16),
            train=dict(epochs=10.0),
            optimizer=dict(drop_epochs=(6.0, 9.0)),
        ),
    )
    return ConfigDict(study)

"""X-Nets: does the rule that samples an expander's graph matter?

python -m analysis.study configs/studies/sampling.py:small --workdir=/tmp/sampling-small
python -m analysis.study configs/studies/sampling.py --workdir=/tmp/sampling

The backbone is IGCNets' plain net, because sampling per input is impossible in a
DenseNet, whose layers have more partners to draw than output channels. Each seed draws
its own graphs, except for Ramanujan graphs, which are not random. Both widths have
Ramanujan graphs in all layers. per_input keeps fewer connections where the net widens,
and is therefore wider; smaller_side draws the same graphs, because no layer of this net
has more inputs than outputs. compress=4 rather than X-Nets' 2, because
sparser graphs differ more in their spectral gaps.

python -m analysis.spectral_gap /tmp/sampling-small
"""

from ml_collections import ConfigDict


def get_config(form: str = "full"):
    if form not in ("small", "full"):
        raise ValueError(f"unknown form {form!r}: choose from small, full")

    def expander(**fields):
        return dict(net=dict(wiring=dict(kind="expander", compress=4) | fields))

    study = dict(
        claim="Sampling: at equal parameters, graphs that are sampled per output, per "
        "input or in blocks, and Ramanujan graphs, differ in error.",
        backbones=dict(
            plain=dict(
                config="configs/igcnets.py:plain-20-W16,cifar10",
                width=dict(width=1),
                widths=(32,),
            ),
        ),
        wirings=dict(
            per_output=expander(sampling="per_output"),
            per_input=expander(sampling="per_input"),
            block=expander(sampling="per_output", block=2),
            ramanujan=expander(sampling="ramanujan"),
        ),
        reference="per_output",
        seeds=5,
    )
    if form == "small":
        study["backbones"]["plain"]["widths"] = (24,)
        study["seeds"] = 3
        study["changes"] = dict(
            net=dict(depth=8),
            train=dict(epochs=0.25, batch_size=32, batch_norm_groups=1),
            optimizer=dict(schedule="one_cycle", min_learning_rate=0.0),
        )
    return ConfigDict(study)

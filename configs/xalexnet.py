"""X-AlexNet for ImageNet (Deep Expander Networks, arXiv 1711.08757).

python main.py --config=configs/xalexnet.py --workdir=/tmp/run
python main.py --config=configs/xalexnet.py:dense --workdir=/tmp/run

The code gives the nets and no result or recipe of theirs. Here: that of its other nets
for ImageNet, and for the dense one, which has no batch normalisation, a tenth of their
rate. Deviation: ImageNet is not augmented by scale and aspect.
"""

from configs import common
from configs.common import Variant

IMAGENET = "imagenet2012"
VARIANTS = {
    "expander": Variant({"wiring": "expander"}, {IMAGENET: 5_097_536}),
    "dense": Variant({"wiring": "dense"}, {IMAGENET: 61_100_840}),
}


def get_config(argument: str = ""):
    config = common.select(
        argument,
        VARIANTS,
        "expander",
        name="alexnet",
        image_size=224,  # the linear layers depend on it
        hidden=4096,
        dropout=0.5,  # the expander net has none
        batch_norm=False,  # the expander net always has it
        published_degrees=True,  # False: in // compress, convolutions too
        norm_scale="ones",  # initial; uniform in the original
    )
    config.train.update(batch_size=128, epochs=90.0)
    config.optimizer.update(drop_epochs=(30.0, 60.0), min_learning_rate=1e-5)
    if config.net.wiring == "dense":
        config.optimizer.learning_rate = 0.01
    return config

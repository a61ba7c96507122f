"""X-AlexNet for ImageNet (Deep Expander Networks, arXiv 1711.08757).

python main.py --config=configs/xalexnet.py --workdir=/tmp/run
python main.py --config=configs/xalexnet.py:dense --workdir=/tmp/run

The code publishes neither results nor a recipe for these nets. We use the recipe of its
other ImageNet nets, with a tenth of the learning rate for the dense net, which has no
batch norm.
"""

from configs import common
from configs.common import Variant
from configs.data_sets import IMAGENET

VARIANTS = {
    "expander": Variant({"wiring": {"kind": "expander"}}, {IMAGENET: 5_097_536}),
    "dense": Variant({"wiring": {"kind": "dense"}}, {IMAGENET: 61_100_840}),
}


def get_config(argument: str = ""):
    config = common.select(
        argument,
        VARIANTS,
        "expander",
        name="alexnet",
        image_size=224,  # the linear layers depend on it
        hidden=4096,
        dropout=0.5,  # dense net only
        batch_norm=False,  # dense net only; the expander net always has it
        published_degrees=True,  # False: in // compress, also for convolutions
        norm_scale="uniform",  # initial scales from U(0, 1), as in torch 0.3; or ones
    )
    config.data.crop = "random_resized"
    config.train.update(batch_size=128, epochs=90.0, last_batch="partial")
    config.optimizer.update(drop_epochs=(30.0, 60.0), min_learning_rate=1e-5)
    if config.net.wiring.kind == "dense":
        config.optimizer.learning_rate = 0.01
    return common.apply_recipe(config)

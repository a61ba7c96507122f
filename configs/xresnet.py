"""X-ResNet for ImageNet (Deep Expander Networks, arXiv 1711.08757).

python main.py --config=configs/xresnet.py --workdir=/tmp/run
python main.py --config=configs/xresnet.py:50-2 --workdir=/tmp/run

A variant is depth-compression; without the latter it is the dense twin. All of the
logs were resumed, so the best of their epochs is that of the epochs they hold.
--config.net.sampling=smaller_side is the rule of the published code's head.
Deviation: ImageNet is not augmented by scale and aspect.
"""

from configs import common
from configs.common import Published, Variant

LOG = "Deep-Expander-Networks training log: best on the validation set of epochs"
IMAGENET = "imagenet2012"
# Parameters; top-1 and top-5 error, and the epochs of the log.
NETS = {
    "18": (11_689_512,),
    "18-2": (6_196_776,),
    "34": (21_797_672, 28.34, 9.436, "53 to 75 of 90"),
    "34-2": (11_254_568, 30.772, 10.84, "29 to 77 of 90"),
    "50": (25_557_032, 25.538, 7.898, "54 to 89 of 90"),
    "50-2": (15_218_728, 27.154, 8.788, "51 to 89 of 90"),
    "101": (44_549_160,),
    "101-2": (24_740_904,),
    "152": (60_192_808,),
    "152-2": (32_585_768,),
}


def _variant(name, parameters, error=None, top5=None, epochs=""):
    depth, _, compress = name.partition("-")
    net = dict(depth=int(depth))
    if compress:
        # The history's rule, of the time of the logs.
        net |= dict(wiring="expander", compress=int(compress), sampling="per_output")
    published = {}
    if error:
        row = Published(error, "best", f"{LOG} {epochs}", top5=top5)
        published[IMAGENET] = row
    return Variant(net, {IMAGENET: parameters}, published)


VARIANTS = {name: _variant(name, *row) for name, row in NETS.items()}


def get_config(argument: str = ""):
    config = common.select(
        argument,
        VARIANTS,
        "34-2",
        name="resnet",
        form="imagenet",
        depth=34,
        shortcut="B",
        preactivation=False,
    )
    config.train.update(batch_size=128, epochs=90.0)
    config.optimizer.update(drop_epochs=(30.0, 60.0), min_learning_rate=1e-5)
    return config

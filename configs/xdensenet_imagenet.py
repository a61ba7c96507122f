"""X-DenseNet for ImageNet (Deep Expander Networks, arXiv 1711.08757).

python main.py --config=configs/xdensenet_imagenet.py --workdir=/tmp/run
python main.py --config=configs/xdensenet_imagenet.py:169-2 --workdir=/tmp/run

A variant is depth-compression; without the latter it is the dense twin. Transitions
are dense. The logs were resumed, so the best of their epochs is that of the epochs they
hold. --config.net.sampling=smaller_side is the rule of the published code's head.
Deviation: ImageNet is not augmented by scale and aspect.
"""

from configs import common
from configs.common import Published, Variant

LOG = "Deep-Expander-Networks training log: best on the validation set of epochs"
IMAGENET = "imagenet2012"
# Parameters; top-1 and top-5 error, and the epochs of the log.
NETS = {
    "121": (7_978_856,),
    "121-2": (4_892_520, 29.542, 10.106, "0 to 89 of 90"),
    "161": (28_681_000,),
    "161-2": (16_861_480, 27.626, 8.97, "14 to 60 of 90, where it was cut"),
    "169": (14_149_480,),
    "169-2": (8_482_664, 28.322, 9.506, "32 to 89 of 90"),
    "201": (20_013_928,),
    "201-2": (11_971_432,),
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
        "121-2",
        name="densenet_imagenet",
        depth=121,
        growth=0,  # 0: that of the depth
        blocks=(),  # layers of each; (): those of the depth
        wired_transitions=False,
        norm_scale="ones",  # initial; uniform in the original
    )
    config.train.update(batch_size=128, epochs=90.0)
    config.optimizer.update(drop_epochs=(30.0, 60.0), min_learning_rate=1e-5)
    return config

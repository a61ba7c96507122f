"""X-ResNet and X-DenseNet for ImageNet (Deep Expander Networks, arXiv 1711.08757).

python main.py --config=configs/ximagenet.py --workdir=/tmp/run
python main.py --config=configs/ximagenet.py:densenet-169-2 --workdir=/tmp/run

A variant is network-depth-compression; without the compression it is the dense twin.
The DenseNets have dense transitions. All logs come from resumed runs and cover only
part of the epochs; errors are the best epoch in the log.
--config.net.wiring.sampling=smaller_side is the rule of the latest published code.
"""

from configs import common
from configs.common import Published, Variant
from configs.data_sets import IMAGENET

LOG = "Deep-Expander-Networks training log: best on the validation set of epochs"
FIELDS = {
    "resnet": dict(
        name="resnet",
        form="imagenet",
        shortcut="B",
        preactivation=False,
        torch_bias=True,  # initial bias of the classifier; False: 0
    ),
    "densenet": dict(
        name="densenet_imagenet",
        growth=0,  # 0: follows from the depth
        blocks=(),  # layers in each block; (): follows from the depth
        wired_transitions=False,
        norm_scale="uniform",  # initial scales from U(0, 1), as in torch 0.3; or ones
    ),
}
# Number of GPUs in the logs, each with its own statistics; 1 for the other nets.
GPUS = {"resnet-50": 2, "densenet-121": 2, "densenet-161": 4, "densenet-169": 2}
# Parameters; top-1 and top-5 error, and the epochs of the log.
NETS = {
    "resnet-18": (11_689_512,),
    "resnet-18-2": (6_196_776,),
    "resnet-34": (21_797_672, 28.34, 9.436, "53 to 75 of 90"),
    "resnet-34-2": (11_254_568, 30.772, 10.84, "29 to 77 of 90"),
    "resnet-50": (25_557_032, 25.538, 7.898, "54 to 89 of 90"),
    "resnet-50-2": (15_218_728, 27.154, 8.788, "51 to 89 of 90"),
    "resnet-101": (44_549_160,),
    "resnet-101-2": (24_740_904,),
    "resnet-152": (60_192_808,),
    "resnet-152-2": (32_585_768,),
    "densenet-121": (7_978_856,),
    "densenet-121-2": (4_892_520, 29.542, 10.106, "0 to 89 of 90"),
    "densenet-161": (28_681_000,),
    "densenet-161-2": (16_861_480, 27.626, 8.97, "14 to 60 of 90, the end of the log"),
    "densenet-169": (14_149_480,),
    "densenet-169-2": (8_482_664, 28.322, 9.506, "32 to 89 of 90"),
    "densenet-201": (20_013_928,),
    "densenet-201-2": (11_971_432,),
}


def _variant(name, parameters, error=None, top5=None, epochs=""):
    network, depth, *compress = name.split("-")
    net = FIELDS[network] | dict(depth=int(depth))
    if compress:
        # The sampling rule at the time of the logs.
        wiring = dict(kind="expander", compress=int(*compress), sampling="per_output")
        net |= dict(wiring=wiring)
    row = Published(error, "best", f"{LOG} {epochs}", top5=top5)
    return Variant(net, {IMAGENET: parameters}, {IMAGENET: row} if error else {})


VARIANTS = {name: _variant(name, *row) for name, row in NETS.items()}


def get_config(argument: str = ""):
    config = common.select(argument, VARIANTS, "resnet-34-2")
    config.data.crop = "random_resized"
    gpus = GPUS.get(config.variant.removesuffix("-2"), 1)
    config.train.update(
        batch_size=128, epochs=90.0, last_batch="partial", batch_norm_groups=gpus
    )
    config.optimizer.update(drop_epochs=(30.0, 60.0), min_learning_rate=1e-5)
    return common.apply_recipe(config)

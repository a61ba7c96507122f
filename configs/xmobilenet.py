"""X-MobileNet for ImageNet (Deep Expander Networks, arXiv 1711.08757).

python main.py --config=configs/xmobilenet.py --workdir=/tmp/run
python main.py --config=configs/xmobilenet.py:0.5-4-textbook --workdir=/tmp/run

A variant is a width multiplier and a compression. Without the compression it is the
dense twin; with "groups" before the compression it is the grouped twin. X-MobileNet0.5
has two readings:
- 0.5-2: the net of the published code; stem and last block keep their full width.
- 0.5-2-textbook: all widths are halved. It has the published multiply-adds (85.8M); the
  net of the code has more (105.9M). The published figures count a classifier with 1024
  inputs for the 512 maps of this net, so half of the inputs are unused
  (--config.net.classifier_inputs=0 removes them).
The README does not say which net its errors belong to, and there is no log.
"""

from configs import common
from configs.common import Published, Variant
from configs.data_sets import IMAGENET

README = "Deep-Expander-Networks README: presumably best epoch on the validation set"
LOG = "Deep-Expander-Networks training log: best of 138 epochs on the validation set"
TEXTBOOK = dict(textbook_widths=True, classifier_inputs=1024)

# Compression: error and multiply-adds as printed, parameters of both readings.
EXPANDERS = {
    2: (41.7, "85.8M", 1_584_648, 1_451_400),
    4: (45.7, "53.7M", 1_323_016, 1_255_304),
    8: (50.5, "37.6M", 1_192_200, 1_157_256),
    16: (55.3, "29.5M", 1_126_792, 1_108_232),
}


def _variant(width, parameters, published=None, **fields):
    rows = {} if published is None else {IMAGENET: published}
    return Variant(dict(width=width) | fields, {IMAGENET: parameters}, rows)


def _expanders():
    variants = {}
    for compress, (error, macs, code, textbook) in EXPANDERS.items():
        published = Published(error, "best", README, macs=macs)
        expander = dict(wiring=dict(kind="expander", compress=compress))
        groups = dict(wiring=dict(kind="grouped", groups=compress))
        variants |= {
            f"0.5-{compress}": _variant(0.5, code, published, **expander),
            f"0.5-{compress}-textbook": _variant(
                0.5, textbook, published, **expander, **TEXTBOOK
            ),
            f"0.5-groups-{compress}": _variant(0.5, code, **groups),
        }
    return variants


VARIANTS = {
    **_expanders(),
    "0.5": _variant(0.5, 2_107_912, Published(36.608, "best", LOG, top5=15.256)),
    "0.5-textbook": _variant(0.5, 1_843_592, **TEXTBOOK),
    "1.0": _variant(1.0, 4_231_976),
}


def get_config(argument: str = ""):
    config = common.select(
        argument,
        VARIANTS,
        "0.5-2",
        name="mobilenet",
        width=1.0,
        textbook_widths=False,
        classifier_inputs=0,  # 0: the channels of the last block
        norm_scale="uniform",  # initial scales from U(0, 1), as in torch 0.3; or ones
    )
    config.data.crop = "random_resized"
    config.train.update(
        batch_size=256,
        epochs=150.0,
        last_batch="partial",
        batch_norm_groups=2,  # GPUs in the log
    )
    config.optimizer.update(
        drop_epochs=tuple(15.0 * i for i in range(1, 10)),
        drop_factor=0.316227766,
        min_learning_rate=5e-5,
        nesterov=False,
        weight_decay=4e-5,
    )
    return common.apply_recipe(config)

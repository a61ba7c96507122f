import pytest

from augment.check import check
from configs import common

OPTIONS = common.base().augment.to_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(mixup=1.0, ricap=0.3), "only one of augment.mixup and augment.ricap"),
        (dict(autoaugment=True, randaugment_ops=2), "only one of augment.autoaugment"),
        (dict(cutout=-1), "augment.cutout: .* at least 0, got -1"),
        (dict(hls=(36.0, -1.0, 50.0)), "augment.hls: .* at least 0, got -1.0"),
        (dict(mixup=float("nan")), "augment.mixup: .* finite number .* got nan"),
        (dict(jitter=1.5), "augment.jitter must be at most 1, got 1.5"),
        (dict(hls=(36.0,)), r"\(hue, lightness, saturation\).* got \(36.0,\)"),
        (dict(randaugment_magnitude=31.0), "at most 30, got 31.0"),
        (dict(cutmix_probability=1.5), "at most 1, got 1.5"),
        (dict(mixup=1.0), "groups of 2, .* the 7 images .*last_batch=fill"),
        (dict(ricap=0.3), "groups of 4, .* the 7 images"),
    ],
)
def test_invalid_options_are_rejected(options, message):
    with pytest.raises(ValueError, match=message):
        check(OPTIONS | options, 7)


def test_valid_options_are_accepted():
    check(OPTIONS, 7)  # nothing is mixed, so any number of images will do
    options = dict(
        jigsaw=True,
        randaugment_ops=2,
        hls=(36.0, 50.0, 50.0),
        jitter=0.4,
        lighting=0.1,
        cutout=8,
        ricap=0.3,
    )
    check(OPTIONS | options, 8)

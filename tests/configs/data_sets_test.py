"""The table of facts against the data themselves."""

import numpy as np
import pytest

import data_sources
import input_pipeline
from configs import common
from configs.data_sets import DATA_SETS


@pytest.mark.parametrize(
    "name", ["digits", pytest.param("cifar10", marks=pytest.mark.slow)]
)
def test_facts_are_those_of_the_data(name, request):
    facts, data = DATA_SETS[name], common.base().data
    data.name = name
    if name != "digits":
        data.dir = str(request.getfixturevalue("shared") / "data" / "tfds")
    split = input_pipeline.load(data, "train")
    assert len(split) == facts.num_train
    assert len(split.class_names) == facts.num_classes
    assert split.image_shape == (facts.image_size, facts.image_size, 3)
    exact = data_sources.statistics(split.images)
    np.testing.assert_allclose(exact, (facts.mean, facts.std), rtol=0, atol=0.051)

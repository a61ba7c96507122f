"""Weights of cross-layer connections, from nets with known weights."""

import sys

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nets
from analysis import cross_layer
from configs import common
from tests.support import tiny


def create(name, **fields):
    config = common.base().net
    with config.unlocked():
        config.update(tiny.config(name, "dense") | fields)
    return nets.create(config, nnx.Rngs(0))


@pytest.fixture(scope="module")
def deluge():
    return create("delugenet", layers=(3, 2))


def test_untrained_nets_average(deluge):
    first, second = cross_layer.weights(deluge)
    # A layer of the first block opens it. Readers: the layers and what follows them.
    assert first.shape == second.shape == (3, 3)
    known = np.tri(3)
    for matrix in (first, second):
        np.testing.assert_allclose(np.nan_to_num(matrix), known, rtol=1e-6)
        np.testing.assert_array_equal(np.isnan(matrix), known == 0)


def test_signs_and_norms_of_channels_do_not_matter(deluge):
    cross = deluge.cross
    sources, channels = cross.scale.shape
    shares = np.random.default_rng(0).dirichlet(np.ones(sources), channels).T
    gains = np.linspace(-2, 3, channels)  # one sign and norm for each channel
    cross.scale[...] = jnp.asarray(shares * gains)
    relative = cross_layer.relative_weights(cross)
    used = gains != 0
    np.testing.assert_allclose(relative, sources * shares[:, used].mean(1), rtol=1e-5)
    assert relative.mean() == pytest.approx(1)


def test_figure_names_readers_and_sources(deluge):
    figure = cross_layer.figure(cross_layer.weights(deluge), "tiny")
    first, second, bar = figure.axes
    assert [x.get_text() for x in first.get_xticklabels()] == ["opening", "1", "2"]
    names = [[y.get_text() for y in axis.get_yticklabels()] for axis in (first, second)]
    assert names == [
        ["layer 1", "layer 2", "transition"],
        ["layer 1", "layer 2", "classifier"],
    ]
    assert bar.get_ylabel() == "weight relative to the plain average"


@pytest.mark.parametrize(
    ("name", "fields"), [("densenet", {}), ("delugenet", {"cross_layer": False})]
)
def test_other_nets_are_errors(name, fields):
    net = nnx.eval_shape(lambda: create(name, **fields))
    with pytest.raises(ValueError, match="without cross-layer connections"):
        cross_layer.weights(net)


def test_command_without_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["cross_layer", "nowhere"])
    with pytest.raises(SystemExit, match=r"error: .*nowhere"):
        cross_layer.main()
    assert not list(tmp_path.iterdir())

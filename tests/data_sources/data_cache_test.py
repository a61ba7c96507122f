"""The cache returns the decoded pixels, and never damaged ones."""

import logging as standard_logging
import pathlib

import numpy as np
import pytest
from absl import logging

import input_pipeline
from configs import common
from tests.support.tfds_writer import pixels, write_set


@pytest.fixture
def data(tmp_path):
    """config.data with all directories inside tmp_path."""
    data = common.base().data
    data.name, data.dir, data.cache_dir = "tiny", str(tmp_path), str(tmp_path / "cache")
    return data


@pytest.fixture
def decodings(monkeypatch):
    """The number of decoded images for each decoded split."""
    calls, info = [], logging.info

    def counted(text, *arguments):
        if text.startswith("reading"):
            calls.append(int(arguments[2]))
        info(text, *arguments)

    monkeypatch.setattr(logging, "info", counted)
    return calls


def test_decoding_happens_once_for_unchanged_files(data, decodings):
    directory = write_set(data.dir, "tfrecord")
    first, second = (input_pipeline.load(data, "train").images for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert decodings == [23]
    for path in directory.iterdir():
        path.unlink()
    directory.rmdir()
    write_set(data.dir, "tfrecord", shape=(8, 6, 1))  # same names, other images
    assert (input_pipeline.load(data, "train").images != first).any()
    assert decodings == [23, 23]


def damages(content, rng):
    yield b""
    yield content[: len(content) // 2]
    yield content[:-1]
    for position in rng.choice(len(content), 150, replace=False):
        flipped = bytearray(content)
        flipped[position] ^= 1 << rng.integers(8)
        yield bytes(flipped)


def test_a_damaged_cache_never_changes_a_pixel(data, decodings, caplog):
    write_set(
        data.dir, "tfrecord", shape=(3, 2, 3)
    )  # small, so that headers are damaged too
    expected = pixels("train", 23, (3, 2, 3))
    input_pipeline.load(data, "train")
    (entry,) = pathlib.Path(data.cache_dir).iterdir()
    whole = entry.read_bytes()
    for content in damages(whole, np.random.default_rng(0)):
        entry.write_bytes(content)
        examples = input_pipeline.load(data, "train")
        np.testing.assert_array_equal(examples.images, expected)
        np.testing.assert_array_equal(examples.labels, np.arange(23) % 3)
        assert np.load(entry)["images"].shape == expected.shape  # intact or rebuilt
    assert len(decodings) > 100
    assert "reading the data again" in caplog.text


def test_an_unwritable_cache_is_only_a_warning(data, tmp_path, caplog):
    write_set(data.dir, "tfrecord")
    (tmp_path / "file").touch()
    data.cache_dir = str(tmp_path / "file" / "cache")
    with caplog.at_level(standard_logging.WARNING):
        assert len(input_pipeline.load(data, "test").labels) == 7
    assert data.cache_dir in caplog.text


def test_a_full_disk_leaves_no_partial_file(data, monkeypatch, caplog):
    def full(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    write_set(data.dir, "tfrecord")
    monkeypatch.setattr(np, "savez", full)
    assert len(input_pipeline.load(data, "test").labels) == 7
    assert "No space left" in caplog.text
    assert not list(pathlib.Path(data.cache_dir).iterdir())

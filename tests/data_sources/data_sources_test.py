"""Every source returns the stored pixels, or an error that names the cause."""

import hashlib
import io
import pathlib
import subprocess
import sys
import urllib.error
import urllib.request

import numpy as np
import pytest
from absl import logging

import input_pipeline
from configs import common
from data_sources import DataError, digits, statistics, tfrecords
from tests.support.tfds_writer import FORMATS, pixels, png, save_npz, write_set


@pytest.fixture
def data(tmp_path):
    """config.data with all directories inside tmp_path."""
    data = common.base().data
    data.name, data.dir, data.cache_dir = "tiny", str(tmp_path), str(tmp_path / "cache")
    return data


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*arguments, **keywords):
        raise AssertionError("the network was used")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr("socket.create_connection", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)


def crc32c(*pieces):
    content = np.frombuffer(b"".join(pieces), np.uint8)
    lengths = np.array([len(piece) for piece in pieces])
    return tfrecords.crc32c(content, np.cumsum(lengths) - lengths, lengths)


def test_checksum_is_castagnolis():
    assert hex(crc32c(b"123456789")[0]) == "0xe3069283"  # the published check value
    pieces = b"a", b"123456789", b"", b"bc"
    assert list(crc32c(*pieces)) == [crc32c(piece)[0] for piece in pieces]


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("shards", [1, 3])
def test_tfds_files_return_the_written_pixels_in_order(data, file_format, shards):
    write_set(data.dir, file_format, shards=shards)
    for split, count in (("train", 23), ("test", 7)):
        examples = input_pipeline.load(data, split)
        np.testing.assert_array_equal(examples.images, pixels(split, count))
        np.testing.assert_array_equal(examples.labels, np.arange(count) % 3)
        assert (examples.images.dtype, examples.labels.dtype) == (np.uint8, np.int32)
        assert examples.class_names == ("0", "1", "2")


def test_grey_images_get_three_equal_channels(data):
    write_set(data.dir, "tfrecord", shape=(8, 6, 1))
    images = input_pipeline.load(data, "test").images
    np.testing.assert_array_equal(images, pixels("test", 7, (8, 6, 1)).repeat(3, -1))


def test_a_set_without_a_recipe_has_the_statistics_of_its_training_images(data):
    write_set(data.dir, "tfrecord")
    train = pixels("train", 23).astype(np.float64)
    splits = input_pipeline.load_both(input_pipeline.find(data))
    assert [len(split) for split in splits] == [23, 7]
    facts = input_pipeline.facts(data, splits[0])
    np.testing.assert_allclose(facts.mean, train.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(facts.std, train.std((0, 1, 2)), rtol=1e-12)
    assert (facts.num_train, facts.num_classes) == (23, 3)
    assert facts.image_shape == (8, 6, 3)


def test_normalisation_is_the_users_then_the_recipes(data):
    write_set(data.dir, "tfrecord")
    train = input_pipeline.load(data, "train")
    recipe = (1.0, 2.0, 3.0), (4.0, 5.0, 6.0)
    data.recipe.update(name="tiny", mean=recipe[0], std=recipe[1])
    for name in ("tiny", "tiny:1.0.0"):
        data.name = name
        facts = input_pipeline.facts(data, train)
        assert (facts.mean, facts.std) == recipe
    data.std = (7.0, 8.0, 9.0)
    facts = input_pipeline.facts(data, train)
    assert (facts.mean, facts.std) == (recipe[0], data.std)
    data.recipe.name = "another"
    mean = pixels("train", 23).astype(np.float64).mean((0, 1, 2))
    np.testing.assert_allclose(input_pipeline.facts(data, train).mean, mean)


@pytest.mark.parametrize("std", [(1.0, 1.0), (1.0, 0.0, 1.0), ("a", "b", "c")])
def test_impossible_statistics_are_rejected(data, std):
    data.name, data.std = "digits", std
    with pytest.raises(DataError, match=r"data\.std must be 3 positive numbers"):
        input_pipeline.load(data, "test")


def test_the_newest_version_is_read_unless_one_is_named(data):
    write_set(data.dir, "tfrecord", version="9.0.0")
    write_set(data.dir, "tfrecord", version="10.0.0", shape=(4, 4, 3))
    assert input_pipeline.load(data, "test").images.shape == (7, 4, 4, 3)
    data.name = "tiny:9.0.0"
    assert input_pipeline.load(data, "test").images.shape == (7, 8, 6, 3)


def flip(path):
    content = bytearray(path.read_bytes())
    content[content.rindex(b"IDAT") + 20] ^= 16  # in the last image
    path.write_bytes(content)


DAMAGE = {
    "emptied": lambda path: path.write_bytes(b""),
    "cut in the middle": lambda path: path.write_bytes(path.read_bytes()[:-300]),
    "cut at the end": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "flipped bit": flip,
    "removed": lambda path: path.unlink(),
}


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_named_and_not_decoded(data, file_format, damage):
    directory = write_set(data.dir, file_format)
    DAMAGE[damage](directory / f"tiny-train.{file_format}-00000-of-00001")
    with pytest.raises(DataError, match=f"{directory} is damaged or incomplete"):
        input_pipeline.load(data, "train")
    assert len(input_pipeline.load(data, "test").labels) == 7
    assert not list(pathlib.Path(data.cache_dir).glob("*train*"))


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
def test_damaged_descriptions_are_named(data, name):
    directory = write_set(data.dir, "tfrecord")
    (directory / name).write_text("")
    with pytest.raises(DataError, match=str(directory)):
        input_pipeline.load(data, "train")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(encode=lambda image: png(image)[:-30]), "damaged"),  # checksum is right
        (dict(encode=lambda image: b"no image"), "damaged"),
        (dict(encode=lambda image: png(image[:, :-1])), r"\(5, 8\), expected \(6, 8\)"),
        (dict(declared=(None, None, 3)), "one size"),
        (dict(shape=(8, 6, 4)), "channels"),
        (dict(classes=2), r"0\.\.2, but 2 classes are numbered 0\.\.1"),
    ],
)
def test_sets_that_cannot_be_trained_on_are_rejected(data, change, message):
    write_set(data.dir, "tfrecord", **change)
    with pytest.raises(DataError, match=message):
        input_pipeline.load(data, "train")


def test_damaged_images_are_skipped_and_logged_on_request(data, monkeypatch):
    images, logged = pixels("train", 23), []
    encoded = [(png(image), i % 3) for i, image in enumerate(images)]
    encoded[4] = (b"no image", 1)
    encoded[9] = (encoded[9][0][:-30], 0)
    write_set(data.dir, "tfrecord", encoded={"train": encoded, "test": encoded[:4]})
    with pytest.raises(DataError, match=r"image [49]: .*--config\.data\.on_error=skip"):
        input_pipeline.load(data, "train")
    monkeypatch.setattr(
        logging, "warning", lambda text, *args: logged.append(text % args)
    )
    data.on_error = "skip"
    for _ in range(2):  # the second comes from the cache
        examples = input_pipeline.load(data, "train")
        good = np.delete(np.arange(23), (4, 9))
        np.testing.assert_array_equal(examples.images, images[good])
        np.testing.assert_array_equal(examples.labels, good % 3)
        assert logged.pop().startswith("skipped 2 damaged images of ")
    data.on_error = "raise"  # the cache does not hide them
    with pytest.raises(DataError, match="image"):
        input_pipeline.load(data, "train")


def test_missing_data_names_the_directory_and_the_remedies(data, monkeypatch):
    data.name = "cifar10"
    with pytest.raises(DataError) as error:
        input_pipeline.load(data, "train")
    for part in (data.dir, "data.dir,", "data.name=digits", "data.download=True"):
        assert part in str(error.value)
    monkeypatch.setenv("TFDS_DATA_DIR", "/nowhere")
    data.dir = ""
    with pytest.raises(DataError, match="cifar10 not found in /nowhere"):
        input_pipeline.load(data, "train")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifra10", "unknown data set 'cifra10'; nearest: cifar10, "),
        ("cifar_10/", "unknown data set 'cifar_10'; nearest: cifar10, "),
        ("../cifar10", "unknown data set '..'; nearest: cifar10, cifar100, "),
        ("*", r"unknown data set '\*'; nearest: cifar10, cifar100, "),
        ("", "unknown data set ''; nearest: cifar10, cifar100, "),
        ("modes", r"nearest: .*\. /.* has no folder modes/train/CLASS"),
        ("/nowhere/flowers", "^no directory /nowhere/flowers: check"),
    ],
)
def test_misspelt_names_list_the_nearest(data, name, message):
    data.name = name
    with pytest.raises(DataError, match=message):
        input_pipeline.load(data, "train")


def test_an_unknown_on_error_is_rejected(data):
    data.name, data.on_error = "digits", "ignore"
    with pytest.raises(DataError, match=r"'ignore': choose from raise, skip"):
        input_pipeline.load(data, "train")


def test_download_without_a_network_fails_at_once(data, monkeypatch):
    def unreachable(request, timeout):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    data.name, data.download = "cifar10", True
    with pytest.raises(DataError, match=r"could not be downloaded.*cs\.toronto\.edu"):
        input_pipeline.load(data, "train")


def test_download_waits_ten_seconds_for_a_server(data, monkeypatch):
    waits = []

    def silent(request, timeout):
        waits.append(timeout)
        raise TimeoutError("timed out")

    monkeypatch.setattr(urllib.request, "urlopen", silent)
    data.name, data.download = "cifar10", True
    with pytest.raises(DataError, match=r"could not be downloaded.*timed out"):
        input_pipeline.load(data, "train")
    assert waits == [10.0]


@pytest.mark.parametrize("answer", [None, 404])
def test_a_download_is_loaded_even_if_the_server_refuses_the_probe(
    data, monkeypatch, answer
):
    class Builder:
        url_infos = ("https://example.org/tiny.zip",)

        def download_and_prepare(self):
            write_set(data.dir, "tfrecord")

    def urlopen(request, timeout):
        if answer:
            raise urllib.error.HTTPError(request.full_url, answer, "no", {}, None)
        return io.BytesIO()

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    monkeypatch.setattr("tensorflow_datasets.builder", lambda *_, **__: Builder())
    monkeypatch.setattr("tensorflow_datasets.list_builders", lambda **_: ["tiny"])
    data.download = True
    assert len(input_pipeline.load(data, "train").labels) == 23


def test_every_fifth_stored_digit_is_for_testing(data):
    data.name = "digits"
    with np.load(digits.FILE) as file:
        images, target = file["images"], file["labels"]
    for split, count in (("train", 1437), ("test", 360)):
        examples = input_pipeline.load(data, split)
        assert examples.images.shape == (count, 32, 32, 3)
        chosen = [i for i in range(1797) if (i % 5 == 0) == (split == "test")]
        np.testing.assert_array_equal(examples.labels, target[chosen])
        small = examples.images.reshape(-1, 8, 4, 8, 4, 3).mean((2, 4, 5)) / 255 * 16
        truth = images[chosen[:200]].reshape(200, -1).astype(float)
        distance = ((small.reshape(len(small), 1, -1) - truth) ** 2).sum(-1)
        np.testing.assert_array_equal(distance.argmin(0), np.arange(200))


# SHA-256 of the images followed by the int32 labels.
DIGITS = {
    "train": "16660073a75f1185578f7877b34075682b6a4065c7e4b06b018bf1f7612e65bd",
    "test": "87a90fcf29467b41d4f6d8b9bf3625be4bc4480e9b3dada06b17060b94125d3b",
}


@pytest.mark.parametrize("split", DIGITS)
def test_digits_have_the_known_checksums(data, split):
    data.name = "digits"
    examples = input_pipeline.load(data, split)
    content = examples.images.tobytes() + examples.labels.tobytes()
    assert hashlib.sha256(content).hexdigest() == DIGITS[split]


# CIFAR-10 as PNG, the official pixels; CIFAR-100 as JPEG, decoded accurately, which
# TensorFlow's default does not.
DIGESTS = {
    "cifar10": "b5c44d23279da9b49400dab7fa1cf09e44a4ffcf5e20dd1654a34b2fd0dc16b6",
    "cifar100": "afda5a3912c0e3718cc34c4e3e07df7209da18a5c1a24af99573b3b302f1e75f",
}
MOMENTS = {
    "cifar10": ((126.025, 123.709, 114.854), (62.896, 61.938, 66.706)),
    "cifar100": ((129.695, 124.262, 112.656), (68.312, 65.576, 70.592)),
}
LABELS = {
    "cifar10": [4, 0, 3, 2, 7, 5, 1, 8, 5, 1],
    "cifar100": [99, 56, 1, 66, 47, 1, 91, 15, 61, 84],
}


@pytest.mark.parametrize("name", DIGESTS)
def test_cifar_is_decoded_accurately(data, shared, name):
    data.name, data.dir = name, str(shared / "data" / "tfds")
    if not pathlib.Path(data.dir, name).is_dir():
        pytest.skip(f"{name} is not in {data.dir}")
    examples = input_pipeline.load(data, "test")
    assert hashlib.sha256(examples.images).hexdigest() == DIGESTS[name]
    assert list(examples.labels[:10]) == LABELS[name]
    np.testing.assert_allclose(statistics(examples.images), MOMENTS[name], atol=6e-4)


WITHOUT_TENSORFLOW = """
import importlib.abc, importlib.machinery, sys

class Loader(importlib.abc.Loader):
    def create_module(self, spec):
        raise AssertionError("something imports TensorFlow")
    def exec_module(self, module):
        pass

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "tensorflow":
            return importlib.machinery.ModuleSpec(name, Loader())

sys.meta_path.insert(0, Finder())
import input_pipeline
from configs import common

config = common.base()
config.data.pipeline, config.train.batch_size, config.eval.batch_size = "device", 8, 4
config.data.cache_dir = sys.argv[1]
for name, directory in zip(sys.argv[2::2], sys.argv[3::2]):
    config.data.name, config.data.dir = name, directory
    next(input_pipeline.batches(config, "train"))
    for batch in input_pipeline.batches(config, "test"):
        pass
    assert "tensorflow" not in sys.modules
print("done")
"""


def test_no_source_and_no_device_batch_imports_tensorflow(tmp_path):
    arguments = [str(tmp_path / "cache"), "digits", "", str(save_npz(tmp_path)), ""]
    for file_format in FORMATS:
        write_set(tmp_path / file_format, file_format)
        arguments += ["tiny", str(tmp_path / file_format)]
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_TENSORFLOW, *arguments],
        cwd=pathlib.Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout == "done\n", result.stderr

"""Small archives in the official layouts, intact, incomplete, damaged and malicious."""

import io
import os
import pickle
import tarfile

import numpy as np
import pytest

import input_pipeline
from configs import common
from data_sources import DataError, archives, pickles
from tests.support.tfds_writer import FORMATS, png, write_set

COUNT = 7  # images in a file


def images(count=COUNT, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 32, 32, 3), np.uint8)


def rows(images):
    return images.transpose(0, 3, 1, 2).reshape(len(images), 3072)


def classes(archive):
    return 100 if "100" in archive.folder else 10


def batch(archive, seed):
    """Returns the content of a file of an archive, its images and labels."""
    x, y = images(seed=seed), np.arange(COUNT) % classes(archive)
    if isinstance(archive.label, bytes):
        content = {b"data": rows(x), archive.label: y.tolist()}
        return pickle.dumps(content, protocol=2), x, y
    labels = np.zeros((COUNT, archive.label + 1), np.uint8)
    labels[:, archive.label] = y
    return np.concatenate([labels, rows(x)], 1).tobytes(), x, y


def save(root, archive, *, packed, without=(), spoil=None):
    """Writes an archive or its folder; returns split -> (images, labels)."""
    expected, files = {}, {}
    for split, names in archive.splits.items():
        parts = [batch(archive, seed=len(files) + i) for i in range(len(names))]
        files |= {n: part[0] for n, part in zip(names, parts, strict=True)}
        expected[split] = [np.concatenate([p[i] for p in parts]) for i in (1, 2)]
    files = {n: spoil or c for n, c in files.items() if n not in without}
    if not packed:
        (root / archive.folder).mkdir()
        for name, content in files.items():
            (root / archive.folder / name).write_bytes(content)
        return expected
    with tarfile.open(root / archive.file, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"{archive.folder}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return expected


OFFICIAL = archives.CIFAR
SMALL = {
    name: [x._replace(count=dict.fromkeys(x.splits, COUNT)) for x in choices]
    for name, choices in OFFICIAL.items()
}
ARCHIVES = [
    pytest.param(name, archive, id=archive.folder)
    for name, choices in SMALL.items()
    for archive in choices
]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(archives, "CIFAR", SMALL)


def load(root, name, split="train"):
    data = common.base().data
    data.name, data.dir = name, str(root)
    return input_pipeline.load(data, split)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("name", "archive"), ARCHIVES)
def test_images_and_labels_equal_those_of_the_files(tmp_path, name, archive, packed):
    expected = save(tmp_path, archive, packed=packed)
    for split, (x, y) in expected.items():
        examples = load(tmp_path, name, split)
        np.testing.assert_array_equal(examples.images, x)
        np.testing.assert_array_equal(examples.labels, y)
        assert len(set(examples.class_names)) == classes(archive)


def test_every_pickle_protocol_is_read():
    for protocol in (0, 1, 2, 3, 4):
        content = {b"data": rows(images()), b"labels": list(range(COUNT))}
        found = pickles.loads(pickle.dumps(content, protocol))
        np.testing.assert_array_equal(found[b"data"], rows(images()))
        assert found[b"labels"] == list(range(COUNT))


@pytest.mark.parametrize("dtype", ["u1", "i4", "<i8", ">i4", "f2", "f4", ">f8", "b1"])
def test_arrays_of_numbers_are_read(dtype):
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    for protocol in (0, 1, 2, 3, 4):
        for expected in (array, np.asfortranarray(array)):
            found = pickles.loads(pickle.dumps([expected], protocol))[0]
            np.testing.assert_array_equal(found, expected)
            assert found.dtype == expected.dtype.newbyteorder("=")


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("packed", [True, False])
def test_a_malicious_pickle_is_rejected_and_not_run(tmp_path, packed):
    target = tmp_path / "executed"
    spoil = pickle.dumps({b"data": Malicious(target), b"labels": [0]})
    save(tmp_path, SMALL["cifar10"][0], packed=packed, spoil=spoil)
    with pytest.raises(DataError, match=r"data_batch_1.*mkdir: refused"):
        load(tmp_path, "cifar10")
    assert not target.exists()
    pickle.loads(spoil)  # pickle itself runs it
    assert target.exists()


class Pointers:
    """Pickles as an array of objects at an address that an attacker chooses."""

    def __reduce__(self):
        return np.ndarray, ((1,), np.dtype(object), b"\x41" * 8)


class Restored:
    """The same in the form in which numpy pickles arrays."""

    def __reduce__(self):
        state = (1, (1,), np.dtype(object), False, b"\x41" * 8)
        return np._core.multiarray._reconstruct, (np.ndarray, (0,), b"b"), state


@pytest.mark.parametrize("content", [Pointers(), Restored()])
@pytest.mark.parametrize("key", [b"data", b"labels"])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_object_arrays_are_rejected(content, key, protocol):
    """Using one would crash the process."""
    batch = {b"data": rows(images()), b"labels": list(range(COUNT)), key: content}
    with pytest.raises(pickle.UnpicklingError, match="refused"):
        pickles.loads(pickle.dumps(batch, protocol))


@pytest.mark.parametrize(("name", "archive"), ARCHIVES)
def test_a_missing_file_is_named(tmp_path, name, archive):
    last = archive.splits["test"][-1]
    save(tmp_path, archive, packed=True, without=[last])
    load(tmp_path, name)
    with pytest.raises(DataError, match=f"lacks {last}"):
        load(tmp_path, name, "test")


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9])
@pytest.mark.parametrize(("name", "archive"), ARCHIVES)
def test_a_truncated_archive_is_an_error_that_names_it(tmp_path, name, archive, keep):
    save(tmp_path, archive, packed=True)
    path = tmp_path / archive.file
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(DataError, match=archive.file):
        load(tmp_path, name, "test")


@pytest.mark.parametrize(("name", "archive"), ARCHIVES)
def test_a_damaged_archive_is_never_trained_on(tmp_path, name, archive):
    """A flipped bit is detected: gzip has a checksum, tar has none."""
    save(tmp_path, archive, packed=True)
    path = tmp_path / archive.file
    content, rng = path.read_bytes(), np.random.default_rng(0)
    for position in rng.integers(200, len(content), 20):
        flipped = bytearray(content)
        flipped[position] ^= 1 << rng.integers(8)
        path.write_bytes(flipped)
        with pytest.raises(DataError, match=archive.file):
            load(tmp_path, name)
    for end in (-1, -8):  # within the trailer: checksum and length
        path.write_bytes(content[:end])
        with pytest.raises(DataError, match=archive.file):
            load(tmp_path, name)


@pytest.mark.parametrize(("name", "archive"), ARCHIVES)
def test_a_file_with_fewer_images_is_rejected(tmp_path, monkeypatch, name, archive):
    more = archive._replace(count=archive.count | {"train": COUNT + 1})
    monkeypatch.setitem(archives.CIFAR, name, [more])
    save(tmp_path, archive, packed=False)
    first = archive.splits["train"][0]
    with pytest.raises(DataError, match=f"{first} is damaged .*7 images, expected 8"):
        load(tmp_path, name)
    assert len(load(tmp_path, name, "test").labels) == COUNT * len(
        archive.splits["test"]
    )


def test_the_official_files_have_60_000_images():
    for archive in [x for choices in OFFICIAL.values() for x in choices]:
        images = {s: n * len(archive.splits[s]) for s, n in archive.count.items()}
        assert images == {"train": 50_000, "test": 10_000}


@pytest.mark.parametrize(("name", "archive"), ARCHIVES)
def test_a_damaged_file_is_an_error_that_names_it(tmp_path, name, archive):
    save(tmp_path, archive, packed=False, spoil=b"not a batch")
    first = archive.splits["train"][0]
    with pytest.raises(DataError, match=first):
        load(tmp_path, name)


def test_a_label_out_of_range_is_rejected(tmp_path):
    archive = SMALL["cifar10"][1]
    save(tmp_path, archive, packed=False)
    path = tmp_path / archive.folder / "test_batch.bin"
    path.write_bytes(b"\x0a" + path.read_bytes()[1:])
    with pytest.raises(DataError, match=r"labels lie in 1\.\.10"):
        load(tmp_path, "cifar10", "test")


def save_svhn(root, **spoiled):
    savemat, expected = pytest.importorskip("scipy.io").savemat, {}
    for seed, part in enumerate(("train", "test", "extra")):
        x, y = images(COUNT, seed), 1 + np.arange(COUNT) % 10
        content = {"X": x.transpose(1, 2, 3, 0), "y": y[:, None].astype(np.uint8)}
        savemat(root / f"{part}_32x32.mat", content | spoiled)
        expected[part] = (x, y % 10)  # 10 stands for the digit 0
    return expected


def test_svhn_with_and_without_its_extra_images(tmp_path):
    parts = save_svhn(tmp_path)
    for name, split, wanted in (
        ("svhn_cropped", "train", ["train"]),
        ("svhn_cropped_extra", "train", ["train", "extra"]),
        ("svhn_cropped_extra", "test", ["test"]),
    ):
        examples = load(tmp_path, name, split)
        x, y = (np.concatenate([parts[p][i] for p in wanted]) for i in (0, 1))
        np.testing.assert_array_equal(examples.images, x)
        np.testing.assert_array_equal(examples.labels, y)


def save_in_tfds(root, file_format="array_record"):
    parts = {x: images(n, n) for x, n in (("train", 5), ("extra", 8), ("test", 3))}
    encoded = {x: [(png(y), i) for i, y in enumerate(z)] for x, z in parts.items()}
    options = dict(shape=(32, 32, 3), classes=10, shards=2, encoded=encoded)
    write_set(root, file_format, set_name="svhn_cropped", **options)
    return parts


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize(
    "crop", ["pad", pytest.param("inception", marks=pytest.mark.slow)]
)
def test_svhn_with_its_extra_images_from_tfds(tmp_path, file_format, crop):
    parts = save_in_tfds(tmp_path, file_format)
    data = common.base().data
    data.update(dir=str(tmp_path), cache_dir=str(tmp_path / "cache"), crop=crop)
    for name, split, wanted in (
        ("svhn_cropped", "train", ["train"]),
        ("svhn_cropped_extra", "train", ["train", "extra"]),
        ("svhn_cropped_extra:1.0.0", "test", ["test"]),
        ("svhn_cropped", "train", ["train"]),  # the two have separate cache entries
        ("svhn_cropped_extra", "train", ["train", "extra"]),
    ):
        data.name = name
        examples = input_pipeline.load(data, split)
        x = np.concatenate([parts[part] for part in wanted])
        y = np.concatenate([np.arange(len(parts[part])) for part in wanted])
        np.testing.assert_array_equal(examples.labels, y)
        if crop == "pad":
            np.testing.assert_array_equal(examples.images, x)
        else:
            assert [examples.read(i) for i in range(len(x))] == [png(i) for i in x]


def test_svhn_with_its_extra_images_is_downloaded(tmp_path, monkeypatch):
    fetched = []

    class Builder:
        url_infos = ()

        def __init__(self, name, data_dir):
            fetched.append(name)

        def download_and_prepare(self):
            save_in_tfds(tmp_path)

    monkeypatch.setattr("tensorflow_datasets.builder", Builder)
    data = common.base().data
    data.update(name="svhn_cropped_extra", dir=str(tmp_path), download=True)
    data.cache_dir = str(tmp_path / "cache")
    assert len(input_pipeline.load(data, "train").labels) == 13
    assert fetched == ["svhn_cropped"]


def test_damaged_svhn_is_an_error_that_names_the_file(tmp_path):
    save_svhn(tmp_path, y=np.zeros((3, 1), np.uint8))
    with pytest.raises(DataError, match=r"train_32x32.*for 3 labels"):
        load(tmp_path, "svhn_cropped")
    path = tmp_path / "train_32x32.mat"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(DataError, match=r"train_32x32.*damaged"):
        load(tmp_path, "svhn_cropped")
    path.unlink()
    with pytest.raises(DataError, match=r"lacks train_32x32"):
        load(tmp_path, "svhn_cropped")


@pytest.mark.parametrize("label", [0, 11, 255])
def test_svhn_labels_out_of_range_are_rejected(tmp_path, label):
    save_svhn(tmp_path, y=np.array([[1, 2, 3, label, 5, 6, 7]], np.uint8).T)
    with pytest.raises(
        DataError, match=f"train_32x32.*label {label}, expected 1 to 10"
    ):
        load(tmp_path, "svhn_cropped")


def test_missing_data_names_the_archives_too(tmp_path):
    with pytest.raises(DataError, match=r"cifar-10-python\.tar\.gz"):
        load(tmp_path, "cifar10")

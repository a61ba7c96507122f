"""Small TFDS directories with known pixels, written without TensorFlow."""

import io
import json
import pathlib

import numpy as np
from PIL import Image

from data_sources import tfrecords


def pixels(split, count, shape=(8, 6, 3)):
    """Returns the images that write_set writes."""
    rng = np.random.default_rng(len(split))
    return rng.integers(0, 256, (count, *shape), dtype=np.uint8)


def png(image):
    buffer = io.BytesIO()
    Image.fromarray(image.squeeze()).save(buffer, "png")
    return buffer.getvalue()


def write_set(
    root,
    file_format,
    *,
    set_name="tiny",
    version="1.0.0",
    shape=(8, 6, 3),
    declared=None,
    classes=3,
    encode=png,
    shards=1,
    encoded=None,
):
    """Writes a TFDS set of 23 training and 7 test images; returns its directory.

    declared: the shape that the description says, if not the true one. encoded: instead
    of these images, split -> [(encoded image, label)].
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.proto import tf_example_pb2

    directory = pathlib.Path(root) / set_name / version
    directory.mkdir(parents=True)
    tfds.features.FeaturesDict(
        {
            "id": tfds.features.Text(),
            "image": tfds.features.Image(shape=declared or shape),
            "label": tfds.features.ClassLabel(num_classes=classes),
        }
    ).save_config(directory)
    splits = []
    if encoded is None:
        encoded = {
            split: [(encode(x), i % 3) for i, x in enumerate(pixels(split, n, shape))]
            for split, n in (("train", 23), ("test", 7))
        }
    for split, images in encoded.items():
        records = []
        for i, (image, label) in enumerate(images):
            example = tf_example_pb2.Example()
            feature = example.features.feature
            feature["id"].bytes_list.value.append(b"%d" % i)
            feature["image"].bytes_list.value.append(image)
            feature["label"].int64_list.value.append(label)
            records.append(example.SerializeToString())
        parts = np.array_split(np.arange(len(records)), shards)
        for shard, part in enumerate(parts):
            name = f"{set_name}-{split}.{file_format}-{shard:05}-of-{shards:05}"
            FORMATS[file_format](directory / name, [records[i] for i in part])
        lengths = [str(len(part)) for part in parts]
        splits.append(
            {
                "name": split,
                "numBytes": "1",
                "shardLengths": lengths,
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            }
        )
    keys = [{"featureKey": "image"}, {"featureKey": "label"}]
    info = {"name": set_name, "version": version, "fileFormat": file_format}
    info |= {"splits": splits, "supervisedKeys": {"tuple": {"items": keys}}}
    (directory / "dataset_info.json").write_text(json.dumps(info))
    return directory


def write_tfrecord(path, records):
    lengths = [len(record).to_bytes(8, "little") for record in records]
    rows = zip(lengths, checksums(lengths), records, checksums(records), strict=True)
    path.write_bytes(b"".join(part for row in rows for part in row))


def checksums(pieces):
    """Returns the checksums that TFRecord stores, 4 bytes each."""
    sizes = np.array([len(piece) for piece in pieces])
    content = np.frombuffer(b"".join(pieces), np.uint8)
    crc = tfrecords.crc32c(content, np.cumsum(sizes) - sizes, sizes)
    masked = ((crc >> 15) | (crc << 17)) + np.uint32(0xA282EAD8)
    return [int(x).to_bytes(4, "little") for x in masked]


def write_array_record(path, records):
    from array_record.python import array_record_module

    writer = array_record_module.ArrayRecordWriter(
        str(path), "group_size:1,uncompressed"
    )
    for record in records:
        writer.write(record)
    writer.close()


FORMATS = {"tfrecord": write_tfrecord, "array_record": write_array_record}


def save_npz(tmp_path, **change):
    """Writes an .npz of 9 training and 4 test images, with some arrays changed."""
    arrays = {
        "x_train": pixels("train", 9),
        "y_train": np.arange(9) % 4,
        "x_test": pixels("test", 4),
        "y_test": np.arange(4),
    } | change
    path = tmp_path / "mine.npz"
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    return path

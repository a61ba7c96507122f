"""Small TFDS directories with known pixels, written without TensorFlow."""

import io
import json
import pathlib

import numpy as np
from PIL import Image

import tfrecords


def pixels(split, count, shape=(8, 6, 3)):
    """What write_set puts into a split."""
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
    version="1.0.0",
    shape=(8, 6, 3),
    declared=None,
    classes=3,
    encode=png,
    shards=1,
):
    """The directory of a TFDS set 'tiny', 23 train and 7 test images.

    declared: the shape that the description says, if not the true one.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.proto import tf_example_pb2

    directory = pathlib.Path(root) / "tiny" / version
    directory.mkdir(parents=True)
    tfds.features.FeaturesDict(
        {
            "id": tfds.features.Text(),
            "image": tfds.features.Image(shape=declared or shape),
            "label": tfds.features.ClassLabel(num_classes=classes),
        }
    ).save_config(directory)
    splits = []
    for split, count in (("train", 23), ("test", 7)):
        records = []
        for i, picture in enumerate(pixels(split, count, shape)):
            example = tf_example_pb2.Example()
            feature = example.features.feature
            feature["id"].bytes_list.value.append(b"%d" % i)
            feature["image"].bytes_list.value.append(encode(picture))
            feature["label"].int64_list.value.append(i % 3)
            records.append(example.SerializeToString())
        parts = np.array_split(np.arange(count), shards)
        for shard, part in enumerate(parts):
            name = f"tiny-{split}.{file_format}-{shard:05}-of-{shards:05}"
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
    info = {"name": "tiny", "version": version, "fileFormat": file_format}
    info |= {"splits": splits, "supervisedKeys": {"tuple": {"items": keys}}}
    (directory / "dataset_info.json").write_text(json.dumps(info))
    return directory


def write_tfrecord(path, records):
    def checksum(content):
        array = np.frombuffer(content, np.uint8)
        crc = int(tfrecords.crc32c(array, np.array([0]), np.array([len(array)]))[0])
        crc = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
        return crc.to_bytes(4, "little")

    with path.open("wb") as file:
        for record in records:
            length = len(record).to_bytes(8, "little")
            file.write(length + checksum(length) + record + checksum(record))


def write_array_record(path, records):
    from array_record.python import array_record_module

    writer = array_record_module.ArrayRecordWriter(
        str(path), "group_size:1,uncompressed"
    )
    for record in records:
        writer.write(record)
    writer.close()


FORMATS = {"tfrecord": write_tfrecord, "array_record": write_array_record}

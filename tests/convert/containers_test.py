"""Weight files of every kind: read exactly, or refused if damaged or hostile."""

import contextlib
import io
import os
import pickle
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

from convert import containers
from tests.support import weight_files
from tests.support.weight_files import Code, push, sequence

rng = np.random.default_rng(0)
TENSORS = {
    "1.weight": rng.standard_normal((3, 2, 3, 3)).astype(np.float32),
    "1.bias": rng.standard_normal(3).astype(np.float32),
    "2.weight": rng.standard_normal((4, 5)),
}


def torch7(tensors):
    return weight_files.torch7(
        sequence(*(weight_files.layer("nn.X", name, tensors) for name in "12"))
    )


def neon(tensors):
    first = {b"W": tensors["1.weight"], b"b": tensors["1.bias"]}
    layers = [{b"params": first}, {b"params": {b"W": tensors["2.weight"]}}]
    return weight_files.pickled({b"model": {b"config": {b"layers": layers}}})


WRITERS = {
    "torch zip": lambda x: weight_files.torch_zip({"state_dict": x, "epoch": 3}),
    "torch pickles": lambda x: weight_files.torch_pickles({"state_dict": x}),
    "MXNet 0": lambda x: weight_files.mxnet(x, 0),
    "MXNet 1": lambda x: weight_files.mxnet(x, 1),
    "MXNet 2": lambda x: weight_files.mxnet(x, 2),
    "Torch7": torch7,
    "neon": neon,
    "npz": weight_files.npz,
    "safetensors": weight_files.safetensors,
}


def read(tmp_path, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    return containers.read(path)


@pytest.mark.parametrize("kind", WRITERS)
def test_tensors_are_read_exactly(tmp_path, kind):
    weights = read(tmp_path, WRITERS[kind](TENSORS))
    assert weights.container == kind.split()[0]
    names = {"1.weight": "0.W", "1.bias": "0.b", "2.weight": "1.W"}
    for name, tensor in TENSORS.items():
        found = weights.tensors[names[name] if kind == "neon" else name]
        assert found.dtype == tensor.dtype
        np.testing.assert_array_equal(found, tensor)
    assert len(weights.tensors) == len(TENSORS)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_truncated_file_is_one_line(tmp_path, kind):
    content = WRITERS[kind](TENSORS)
    for end in [0, 1, 7, 8, 9, *range(16, len(content), 29), len(content) - 1]:
        with pytest.raises(containers.ContainerError) as error:
            read(tmp_path, content[:end])
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", WRITERS)
def test_flipped_bytes_never_crash_or_allocate_much(tmp_path, kind):
    """Most formats have no checksum, so a flipped value may be read."""
    content, random = WRITERS[kind](TENSORS), np.random.default_rng(1)
    tracemalloc.start()
    for position in random.integers(0, len(content), 150):
        damaged = bytearray(content)
        damaged[position] ^= 1 << random.integers(8)
        with contextlib.suppress(containers.ContainerError):
            read(tmp_path, damaged)
    assert tracemalloc.get_traced_memory()[1] < 200 * len(content) + 2e6
    tracemalloc.stop()


@pytest.mark.parametrize("kind", ["torch zip", "npz"])
def test_a_flipped_weight_in_an_archive_is_noticed(tmp_path, kind):
    content = bytearray(WRITERS[kind](TENSORS))
    content[content.index(TENSORS["2.weight"].tobytes())] ^= 1
    with pytest.raises(containers.ContainerError, match="CRC"):
        read(tmp_path, content)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", ["torch zip", "torch pickles", "neon"])
def test_a_malicious_pickle_is_not_run(tmp_path, kind):
    target = tmp_path / "executed"
    bad = Code(pickle.dumps(Malicious(target), 2)[2:-1])
    if kind == "neon":
        content = weight_files.pickled({b"model": bad})
    else:
        content = WRITERS[kind](TENSORS | {"x": bad})
    with pytest.raises(containers.ContainerError, match="mkdir: refused"):
        read(tmp_path, content)
    assert not target.exists()


HUGE = 2**40


def zip_of(method=zipfile.ZIP_DEFLATED, **members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def npy(shape, content=b""):
    file = io.BytesIO()
    header = dict(descr="<f4", fortran_order=False, shape=shape)
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + content


def torch_with(**options):
    entry = dict(key="0", dtype=np.float32, shape=(2,), strides=(1,), count=2) | options
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        root = {"state_dict": {"w": weight_files.torch_tensor(**entry)}}
        archive.writestr("archive/data.pkl", weight_files.pickled(root))
        archive.writestr("archive/data/0", bytes(8))
    return file.getvalue()


def nested(depth):
    return (
        b"\3\0\0\0\1\0\0\0\1\0\0\0\1\0\0\0"
        + bytes(8)
        + b"".join(struct.pack("<iiii", 3, i, 1, 1) + bytes(8) for i in range(2, depth))
    )


def torch_pickle(root):
    return zip_of(**{"x/data.pkl": weight_files.pickled(root)})


def nested_lists(depth=40):
    """A list of lists whose repr has 2**depth items."""
    code = push([]) + b"q\1"
    for _ in range(depth):
        code = b"](" + code + b"h\1eq\1"
    return Code(code)


def nested_tuples(depth=40):
    """A tuple whose hash takes 2**depth steps."""
    return Code(b")q\1" + b"h\1\x86q\1" * depth)


def copies(items, function, count=5000):
    """Calls a function `count` times with the same object."""
    return Code(b"](" + items + b"q\0" + function * count + b"e")


PAIRS = b"}(" + b"".join(push(str(i)) + b"N" for i in range(10_000)) + b"u"
ORDERED = b"ccollections\nOrderedDict\n"
STORAGE = weight_files.global_("torch", "FloatStorage")
ARRAY = weight_files.call("numpy.core.multiarray", "_reconstruct", 1)
MAGIC = struct.pack("<QQ", 0x112, 0)
COPIES = b"X" + struct.pack("<I", 50_000) + b"a" * 50_000 + b"q\0"
HOSTILE = {
    "torch: a shape beyond the storage": torch_with(shape=(2**30,)),
    "torch: an expanded number": torch_with(shape=(2**30,), strides=(0,)),
    "torch: negative strides": torch_with(strides=(-1,), offset=1),
    "torch: before the storage": torch_with(offset=-1),
    "torch: a missing storage": torch_with(key="7"),
    "torch: a bomb": zip_of(**{"x/data.pkl": b".", "x/data/0": bytes(10**6)}),
    "torch: an endless kind": torch_pickle(
        Code(push((nested_lists(), STORAGE, "0", "cpu", 2)) + b"Q")
    ),
    "torch: an endless shape": torch_with(shape=(nested_lists(),)),
    "torch: an endless key": torch_pickle(Code(b"}" + nested_tuples() + b"Ns")),
    "neon: an endless key": b"\x80\x02})" + b"2\x86" * 40 + b"Ns.",
    "torch: many sizes": torch_pickle(
        copies(b"](" + b"N" * 10_000 + b"e", b"ctorch\nSize\nh\0\x85R")
    ),
    "torch: many dicts": torch_pickle(copies(PAIRS, ORDERED + b"h\0\x85R")),
    "torch: many attributes": torch_pickle(copies(PAIRS, ORDERED + b")Rh\0b")),
    "neon: an endless dtype": weight_files.pickled(
        Code(ARRAY + push((1, (0,), nested_lists(), False, b"")) + b"b")
    ),
    "neon: an endless name of a dtype": weight_files.pickled(
        weight_files.call("numpy", "dtype", nested_lists())
    ),
    "npz: a bomb of another method": zip_of(
        zipfile.ZIP_BZIP2, **{"w.npy": bytes(10**6)}
    ),
    "npz: a bomb": zip_of(**{"w.npy": bytes(10**7)}),
    "npz: a huge shape": zip_of(**{"w.npy": npy((HUGE,))}),
    "npz: objects": weight_files.npz({"w": np.array([None])}),
    "MXNet: a huge list": MAGIC + struct.pack("<Q", HUGE),
    "MXNet: a huge array": MAGIC + struct.pack("<QIIIiii", 1, 2, 2**31, 2**31, 1, 0, 0),
    "MXNet: many dimensions": MAGIC + struct.pack("<QI", 1, 2**31 - 1),
    "Torch7: a deep nest": nested(5000),
    "Torch7: a huge string": b"\3\0\0\0\1\0\0\0\1\0\0\0\2\0\0\0\xff\xff\xff\x7f",
    "neon: a huge memo": b"\x80\x02Kar\xff\xff\xff\x7f.",
    "neon: a huge bytearray": b"\x80\x05\x96" + struct.pack("<Q", HUGE) + b".",
    "neon: a huge string": b"\x80\x04\x8e" + struct.pack("<Q", HUGE) + b".",
    "neon: many copies": b"\x80\x02]("
    + COPIES
    + b"".join(b"c_codecs\nencode\nh\0X\6\0\0\0latin1\x86R" for _ in range(2000))
    + b"e.",
    "safetensors: a huge shape": struct.pack("<Q", 64)
    + (b'{"w":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,8]}}'[:64]),
    "safetensors: a deep nest": struct.pack("<Q", 50_000) + b'{"w":' + b"[" * 50_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_allocates_little_and_is_one_line(tmp_path, name):
    content = HOSTILE[name]
    tracemalloc.start()
    with pytest.raises(containers.ContainerError) as error:
        read(tmp_path, content)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "\n" not in str(error.value)
    assert peak < 100 * len(content) + 2e6


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a weight file"),
        (b"# a text", "not a weight file"),
        (b"\x89PNG\r\n\x1a\n", "not a weight file"),
        (weight_files.pickled([1, 2]), "no model.config.layers"),
        (weight_files.torch_zip({}), "holds no weights"),
        (weight_files.torch_zip([1]), "expected a state_dict, got list"),
        (weight_files.torch7({"epoch": 3}), "no nn module"),
        (zip_of(**{"readme.txt": "x"}), "holds no weights"),
        (weight_files.torch_zip({"a\n\x1b": np.ones(2)}), "cannot be printed"),
        (weight_files.torch_zip({"a" * 500: np.ones(2)}), "500 characters or more"),
        (torch_pickle(Code(b"cnet\nNet\n")), "net.Net: refused .*save the state_dict"),
        (WRITERS["torch zip"](TENSORS)[:-99], "a torch file but .*incomplete"),
    ],
)
def test_a_foreign_file_is_named(tmp_path, content, message):
    with pytest.raises(containers.ContainerError, match=f"file.*{message}"):
        read(tmp_path, content)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(
        containers.ContainerError, match="absent cannot be read: No such"
    ):
        containers.read(tmp_path / "absent")


def test_torch_prefixes_and_the_optimizer(tmp_path):
    state = {"module.a.weight": TENSORS["1.bias"], "features.module.0.bias": np.ones(2)}
    state["module.a.num_batches_tracked"] = np.array(7)
    content = {
        "epoch": 3,
        "state_dict": state,
        "optimizer": {"state": {"0": np.ones(2)}},
    }
    for write in (weight_files.torch_zip, weight_files.torch_pickles):
        weights = read(tmp_path, write(content))
        assert list(weights.tensors) == ["a.weight", "features.0.bias"]
        assert weights.skipped == ["epoch", "optimizer", "a.num_batches_tracked"]
    content["state_dict"]["a.weight"] = np.ones(2)
    with pytest.raises(containers.ContainerError, match="two tensors are called a"):
        read(tmp_path, weight_files.torch_zip(content))


def test_torch_tensors_may_be_views(tmp_path):
    weights = read(tmp_path, torch_with(shape=(1,), offset=1))
    assert weights.tensors["w"].shape == (1,)
    transposed = TENSORS["2.weight"].T
    content = {"w": np.asfortranarray(transposed)}
    tensor = weight_files.torch_tensor("0", "d", (5, 4), (1, 5), 20)
    root = weight_files.pickled({"w": tensor})
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x/data.pkl", root)
        archive.writestr("x/data/0", TENSORS["2.weight"].tobytes())
    found = read(tmp_path, file.getvalue()).tensors["w"]
    np.testing.assert_array_equal(found, content["w"])


def test_mxnet_prefixes(tmp_path):
    content = {"arg:a_weight": np.ones((2, 3)), "aux:a_moving_var": np.ones(2)}
    weights = read(tmp_path, weight_files.mxnet(content))
    assert list(weights.tensors) == ["a_weight", "a_moving_var"]


def test_neon_skips_identities_and_states(tmp_path):
    frozen = {b"params": {b"W": np.eye(2, 4, dtype=np.float32)}, b"states": []}
    inner = [{b"params": {b"W": np.ones((3, 2))}, b"states": [np.ones(2)]}, frozen]
    layers = [{b"config": {b"layers": inner}}, {b"config": {}}]
    content = {b"model": {b"config": {b"layers": layers}}, b"epoch_index": 1}
    weights = read(tmp_path, weight_files.pickled(content))
    assert list(weights.tensors) == ["0.0.W"]
    assert weights.skipped == ["epoch_index", "0.0.states", "0.1 (identity)"]


def test_torch7_functions_and_replicas_are_skipped(tmp_path):
    replica = weight_files.layer("nn.Linear", "2", TENSORS)
    table = sequence(replica, replica, kind="nn.DataParallelTable")
    weights = read(tmp_path, weight_files.torch7({"model": table, "epoch": 3}))
    assert list(weights.tensors) == ["weight"]
    assert weights.skipped == ["epoch"]
    function = struct.pack("<iii", 8, 99, 4) + b"\x1bLJ\2" + struct.pack("<i", 0)
    head = struct.pack("<iii", 4, 1, 3) + b"V 1" + struct.pack("<i", 4) + b"nn.X"
    fields = struct.pack("<iiiii", 3, 2, 1, 2, 1) + b"f" + function
    with pytest.raises(containers.ContainerError, match="holds no weights"):
        read(tmp_path, head + fields)


def test_shared_modules_are_rejected_at_once(tmp_path):
    """Otherwise a small file would describe a tree of any size."""
    bomb = push([])
    for _ in range(60):
        inner = b"](" + push({b"config": {b"layers": Code(bomb + b"q\1")}})
        bomb = inner + push({b"config": {b"layers": Code(b"h\1")}}) + b"e"
    content = weight_files.pickled({b"model": {b"config": {b"layers": Code(bomb)}}})
    with pytest.raises(containers.ContainerError, match="occur twice"):
        read(tmp_path, content)


def test_every_kind_of_number(tmp_path):
    for dtype in (np.float16, np.float32, np.float64, np.int64, np.uint8):
        content = {"1.weight": np.arange(6).reshape(2, 3).astype(dtype)}
        for kind, write in WRITERS.items():
            if kind in ("Torch7", "neon"):
                continue
            (found,) = read(tmp_path, write(content)).tensors.values()
            assert found.dtype == dtype
            np.testing.assert_array_equal(found, content["1.weight"])


# By the libraries themselves


def test_torch_itself(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    state = {k: torch.from_numpy(v) for k, v in TENSORS.items()}
    state["half"], state["t"] = state["1.bias"].half(), state["2.weight"].t()
    state["b"] = state["1.bias"].bfloat16()
    parameter = torch.nn.Parameter(state["1.bias"])
    optimizer = torch.optim.SGD([parameter], 0.1, momentum=0.9)
    content = {"state_dict": state, "optimizer": optimizer.state_dict(), "epoch": 1}
    for new in (True, False):
        path = tmp_path / "file"
        torch.save(content, path, _use_new_zipfile_serialization=new)
        weights = containers.read(path)
        assert weights.tensors.keys() == state.keys()
        for name, tensor in state.items():
            wanted = tensor.float().numpy() if name == "b" else tensor.numpy()
            np.testing.assert_array_equal(weights.tensors[name], wanted)


def test_safetensors_itself(tmp_path):
    library = pytest.importorskip(
        "safetensors.numpy", reason="safetensors is not installed"
    )
    library.save_file(TENSORS, tmp_path / "file")
    weights = containers.read(tmp_path / "file")
    assert weights.container == "safetensors"
    for name, tensor in TENSORS.items():
        np.testing.assert_array_equal(weights.tensors[name], tensor)


def test_compressed_npz(tmp_path):
    np.savez_compressed(tmp_path / "file.npz", **TENSORS)
    weights = containers.read(tmp_path / "file.npz")
    for name, tensor in TENSORS.items():
        np.testing.assert_array_equal(weights.tensors[name], tensor)
    fortran = {"w": np.asfortranarray(TENSORS["2.weight"])}
    found = read(tmp_path, weight_files.npz(fortran)).tensors["w"]
    np.testing.assert_array_equal(found, fortran["w"])


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_the_normalisation_travels_with_the_tensors(tmp_path, kind):
    write = getattr(containers, kind).write
    normalization = containers.Normalization((0.1, 1 / 3, 255.0), (1e-9, 2.0, 3.0))
    assert read(tmp_path, write(TENSORS, normalization)).normalization == normalization
    assert read(tmp_path, write(TENSORS)).normalization is None
    for std in ((0.0, 1.0, 1.0), (np.nan, 1.0, 1.0), (1.0,), ("a", "b", "c")):
        content = write(TENSORS, normalization._replace(std=std))
        with pytest.raises(containers.ContainerError, match=f"a {kind} file but"):
            read(tmp_path, content)


def test_a_comment_of_other_software_is_ignored(tmp_path):
    with zipfile.ZipFile(tmp_path / "file.npz", "w") as archive:
        with archive.open("a.npy", "w") as member:
            np.save(member, TENSORS["1.bias"])
        archive.comment = b"by hand"
    assert containers.read(tmp_path / "file.npz").normalization is None

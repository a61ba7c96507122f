"""Writes the weight files of the originals, byte by byte from their descriptions."""

import io
import json
import struct
import zipfile

import numpy as np
from flax import nnx

import convert
import nets
from convert.sources import empty, tensor_shapes, to_reference
from nets.layers.expander import Expander


def build(section: dict) -> nnx.Module:
    """Returns a net with zeros in all variables, in eval mode."""
    net = empty(lambda: nets.create(section, nnx.Rngs(0)))
    net.eval()
    return net


def tensors(section: dict, system: str, name: str, seed: int = 0) -> dict:
    """Returns random tensors under the original's names; masks fit the net."""
    net, rng = build(section), np.random.default_rng(seed)
    sources = convert.find(system, name).sources(net)
    found = {
        name: rng.uniform(0.5, 1.5, shape).astype(np.float32)
        for name, shape in tensor_shapes(sources).items()
    }
    nets.configure(net, graph_seed=seed)
    edges = {
        (*path, "edges"): np.asarray(module.edges[...])
        for path, module in nnx.iter_modules(net)
        if isinstance(module, Expander)
    }
    return found | to_reference(sources, edges)


# Pickles


class Code(bytes):
    """Opcodes that push one object."""


def pickled(value) -> bytes:
    """Pickles as Python 2 does: `bytes` are its strings."""
    return b"\x80\x02" + push(value) + b"."


def push(value) -> bytes:
    if isinstance(value, Code):
        return value
    if value is None:
        return b"N"
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, bytes):
        return b"T" + struct.pack("<i", len(value)) + value
    if isinstance(value, str):
        return b"X" + struct.pack("<I", len(value)) + value.encode()
    if isinstance(value, tuple):
        return b"(" + b"".join(map(push, value)) + b"t"
    if isinstance(value, list):
        return b"](" + b"".join(map(push, value)) + b"e"
    if isinstance(value, dict):
        pairs = (push(k) + push(v) for k, v in value.items())
        return b"}(" + b"".join(pairs) + b"u"
    assert isinstance(value, np.ndarray)
    empty = global_("numpy", "ndarray"), (0,), b"b"
    array = call("numpy.core.multiarray", "_reconstruct", *empty)
    dtype = call("numpy", "dtype", value.dtype.str[1:].encode(), 0, 1)
    dtype += push((3, b"<", None, None, None, -1, -1, 0)) + b"b"
    state = (1, value.shape, Code(dtype), False, value.tobytes())
    return array + push(state) + b"b"


def global_(module: str, name: str) -> Code:
    return Code(f"c{module}\n{name}\n".encode())


def call(module: str, name: str, *arguments) -> Code:
    return Code(global_(module, name) + push(arguments) + b"R")


# PyTorch


def torch_zip(content) -> bytes:
    """Writes arrays as tensors: torch.save since version 1.6."""
    root, storages = _torch_tree(content)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickled(root))
        archive.writestr("archive/byteorder", "little")
        for key, values in storages.items():
            archive.writestr(f"archive/data/{key}", values.tobytes())
        archive.writestr("archive/version", "3\n")
    return file.getvalue()


def torch_pickles(content) -> bytes:
    """torch.save of version 0.3, of arrays as tensors."""
    root, storages = _torch_tree(content, view=(None,))
    magic = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
    system = {"protocol_version": 1001, "little_endian": True}
    heads = [1001, system, root, sorted(storages)]
    tail = [
        struct.pack("<q", storages[key].size) + storages[key].tobytes()
        for key in sorted(storages)
    ]
    return magic + b"".join(map(pickled, heads)) + b"".join(tail)


def _torch_tree(content, view=()):
    storages = {}

    def tree(value):
        if isinstance(value, dict):
            return {key: tree(item) for key, item in value.items()}
        if not isinstance(value, np.ndarray):
            return value
        key = str(len(storages))
        value = np.ascontiguousarray(value)
        storages[key] = value.reshape(-1)
        strides = tuple(step // value.itemsize for step in value.strides)
        return torch_tensor(key, value.dtype, value.shape, strides, value.size, view)

    return tree(content), storages


def torch_tensor(key, dtype, shape, strides, count, view=(), offset=0) -> Code:
    names = dict(f="Float", d="Double", e="Half", l="Long", B="Byte")
    kind = global_("torch", f"{names[np.dtype(dtype).char]}Storage")
    storage = Code(push(("storage", kind, key, "cpu", count, *view)) + b"Q")
    hooks = call("collections", "OrderedDict")
    arguments = storage, offset, shape, strides, False, hooks
    return call("torch._utils", "_rebuild_tensor_v2", *arguments)


# MXNet


def mxnet(content: dict, version: int = 2) -> bytes:
    arrays = [_mxnet_array(array, version) for array in content.values()]
    names = [struct.pack("<Q", len(k)) + k.encode() for k in content]
    count = struct.pack("<Q", len(content))
    head = struct.pack("<QQ", 0x112, 0)
    return head + count + b"".join(arrays) + count + b"".join(names)


def _mxnet_array(array, version) -> bytes:
    head = [b"", b"\xc8\xfa\x93\xf9", b"\xc9\xfa\x93\xf9\0\0\0\0"][version]
    number = "q" if version else "I"
    head += struct.pack(f"<I{array.ndim}{number}", array.ndim, *array.shape)
    kind = {"f": 0, "d": 1, "e": 2, "B": 3, "i": 4, "l": 6}[array.dtype.char]
    return head + struct.pack("<iii", 1, 0, kind) + array.tobytes()


# neon


def neon(tensors: dict, stages: tuple[int, ...]) -> bytes:
    """Writes a cfmz ResNet: convolutions have the layout of neon and no names."""

    def convolution(name):
        kernel = tensors[f"{name}.W"]
        if kernel.shape[1] == 3:
            kernel = kernel[:, ::-1]  # blue, green, red
        flat = np.moveaxis(kernel, 0, -1).reshape(-1, len(kernel))
        return {b"params": {b"W": flat}, b"states": [flat]}

    def norm(name):
        leaves = ("gamma", "beta", "gmean", "gvar")
        columns = {x.encode(): tensors[f"{name}.{x}"][:, None] for x in leaves}
        return {b"params": columns}

    def container(layers):
        return {b"container": True, b"config": {b"layers": layers}}

    activation = {b"type": b"neon.layers.layer.Activation", b"config": {}}
    layers = [convolution("stem.conv"), norm("stem.bn"), activation]
    for stage, blocks in enumerate(stages, start=1):
        for i in range(blocks):
            name = f"stage{stage}.{i}"
            branch = [convolution(f"{name}.conv1"), norm(f"{name}.bn1"), activation]
            branch += [convolution(f"{name}.conv2"), norm(f"{name}.bn2")]
            width = 8 * 2**stage
            frozen = {b"params": {b"W": np.eye(width // 2, width, dtype=np.float32)}}
            skip = [frozen] if stage > 1 and i == 0 else []
            layers += [container([container(branch), container(skip)]), activation]
    layers += [{b"params": {b"W": tensors["fc.W"]}}, norm("fc_bn"), activation]
    model = container(layers)
    return pickled({b"epoch_index": 180, b"model": model, b"backend": {b"seed": 0}})


# Torch7


class Module(tuple):
    """(Lua class, fields)."""


def sequence(*modules, kind="nn.Sequential") -> Module:
    return Module((kind, {"modules": dict(enumerate(modules, start=1))}))


def layer(kind: str, name: str, tensors: dict) -> Module:
    """A module with the tensors NAME.weight, NAME.bias, ..."""
    leaves = {
        k.rpartition(".")[2]: v
        for k, v in tensors.items()
        if k.rpartition(".")[0] == name
    }
    assert leaves, name
    return Module((kind, leaves | {"train": False}))


def module_tree(tensors: dict) -> Module:
    """Returns modules for tensors whose names are positions, such as 7.3.weight."""
    tree = {}
    for name, tensor in tensors.items():
        *path, leaf = name.split(".")
        node = tree
        for position in map(int, path):
            node = node.setdefault(position, {})
        node[leaf] = tensor

    def module(node):
        if "weight" in node:
            return Module(("cudnn.X", node))
        inner = {position: module(child) for position, child in node.items()}
        return Module(("nn.Sequential", {"modules": inner}))

    return module(tree)


def torch7(root) -> bytes:
    numbers = iter(range(1, 1_000_000))

    def number(*values):
        return struct.pack(f"<{len(values)}i", *values)

    def text(value):
        return number(len(value)) + value.encode()

    def object_(name, content):
        return number(4, next(numbers)) + text("V 1") + text(name) + content

    def value(x):
        if x is None:
            return number(0)
        if isinstance(x, bool):
            return number(5, x)
        if isinstance(x, (int, float)):
            return number(1) + struct.pack("<d", x)
        if isinstance(x, str):
            return number(2) + text(x)
        if isinstance(x, Module):
            name, fields = x
            index = next(numbers)
            head = number(4, index) + text("V 1") + text(name)
            return head + value(fields)
        if isinstance(x, dict):
            head = number(3, next(numbers), len(x))
            return head + b"".join(value(k) + value(v) for k, v in x.items())
        x, kind = np.ascontiguousarray(x), {"f": "Float", "d": "Double"}[x.dtype.char]
        strides = [step // x.itemsize for step in x.strides]
        shape = number(x.ndim) + struct.pack(f"<{2 * x.ndim}q", *x.shape, *strides)
        head = number(4, next(numbers)) + text("V 1") + text(f"torch.{kind}Tensor")
        storage = struct.pack("<q", x.size) + x.tobytes()
        storage = object_(f"torch.{kind}Storage", storage)
        return head + shape + struct.pack("<q", 1) + storage

    return value(root)


# NumPy and safetensors


def npz(content: dict) -> bytes:
    file = io.BytesIO()
    np.savez(file, **content)
    return file.getvalue()


def safetensors(content: dict) -> bytes:
    header, values = {"__metadata__": {"format": "pt"}}, b""
    names = dict(f="F32", d="F64", e="F16", l="I64", B="U8")
    for name, array in content.items():
        offsets = [len(values), len(values) + array.nbytes]
        kind = names[array.dtype.char]
        entry = dict(dtype=kind, shape=list(array.shape), data_offsets=offsets)
        header[name] = entry
        values += array.tobytes()
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + values

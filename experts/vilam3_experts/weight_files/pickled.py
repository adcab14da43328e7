"""Reads the tensors of a pickled PyTorch module without executing any code of the file.

`torch.load(weights_only=True)` reads state dicts and refuses modules. The releases of torchxrayvision are
whole modules, which this reader handles: classes become inert stubs that keep their attributes and have no
methods, tensors are built from their storages by hand, and every other global is refused by name. It runs
only in `quarantine`, in a separate process.

Both containers of `torch.save` are read, the zip archive and the legacy sequence of pickles followed by raw
storages. torch/serialization.py documents both.
"""

from __future__ import annotations

import collections
import io
import math
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import torch

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_MAX_PICKLE_BYTES = 64 << 20
_MAX_MEMBERS = 100_000
_MAX_DEPTH = 64


class InvalidFileError(ValueError):
    """The file is damaged, hostile, or of an unknown kind."""


class _Storage(NamedTuple):
    """A storage in the file, not yet read."""

    dtype: torch.dtype
    key: str
    count: int


class _Tensor(NamedTuple):
    """A view of a storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Stub:
    """Stands in for an object of the file: keeps the attributes and does nothing."""

    def __new__(cls, *args: object, **kwargs: object) -> _Stub:
        del args, kwargs
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        del args, kwargs
        self.attributes: dict[str, Any] = {}

    def __setstate__(self, state: object) -> None:
        self.attributes = state if isinstance(state, dict) else {}


def _rebuild_tensor(storage: object, offset: object, shape: object, stride: object, *_: object) -> _Tensor:
    if not isinstance(shape, tuple | list) or not isinstance(stride, tuple | list):
        raise InvalidFileError("a tensor's shape is damaged")
    numbers = (offset, *shape, *stride)
    if not isinstance(storage, _Storage) or any(type(n) is not int or n < 0 for n in numbers):
        raise InvalidFileError("a tensor's description is damaged")
    return _Tensor(storage, cast(int, offset), tuple(shape), tuple(stride))


_DTYPES = {
    "BFloat16": torch.bfloat16,
    "Bool": torch.bool,
    "Byte": torch.uint8,
    "Char": torch.int8,
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "Int": torch.int32,
    "Long": torch.int64,
    "Short": torch.int16,
}
_GLOBALS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    **{("torch", f"{name}Storage"): dtype for name, dtype in _DTYPES.items()},
}
_STUBBED = {
    "torch.nn.backends.thnn": ("_get_thnn_function_backend",),  # in modules of PyTorch before 1.3
    "torch.nn.modules.activation": ("ReLU", "Sigmoid", "Softmax"),
    "torch.nn.modules.batchnorm": ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d"),
    "torch.nn.modules.container": ("ModuleDict", "ModuleList", "Sequential"),
    "torch.nn.modules.conv": ("Conv1d", "Conv2d", "Conv3d"),
    "torch.nn.modules.dropout": ("Dropout", "Dropout2d", "Dropout3d"),
    "torch.nn.modules.flatten": ("Flatten",),
    "torch.nn.modules.linear": ("Identity", "Linear"),
    "torch.nn.modules.pooling": ("AdaptiveAvgPool2d", "AvgPool2d", "MaxPool2d"),
    "torch.nn.modules.upsampling": ("Upsample",),
    "torchvision.models.resnet": ("BasicBlock", "Bottleneck", "ResNet"),
    "torchxrayvision.models": ("DenseNet", "ResNet", "_DenseBlock", "_DenseLayer", "_Transition"),
}


class _Unpickler(pickle.Unpickler):
    """Resolves globals to stubs only.

    Attributes:
      storages: every storage that the pickle mentions, by key.
    """

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _GLOBALS:
            return _GLOBALS[module, name]
        if name in _STUBBED.get(module, ()):
            return type(name, (_Stub,), {})
        wanted = f"{ascii(module)[1:-1]}.{ascii(name)[1:-1]}"
        raise InvalidFileError(f"it asks for {wanted}, which no weights need")

    def persistent_load(self, pid: Any) -> Any:
        match pid:
            case ("module", kind, *_) if isinstance(kind, type) and issubclass(kind, _Stub):
                return kind  # the legacy container adds the source text of classes
            case ("storage", torch.dtype() as dtype, str() as key, _, int() as count, *view):
                storage = _Storage(dtype, key, count)
                first = self.storages.setdefault(key, storage)
                if count >= 0 and view in ([], [None]) and first == storage:
                    return storage
        raise InvalidFileError("it refers to a storage in an unknown way")


def _unpickle(file: BinaryIO) -> tuple[Any, dict[str, _Storage]]:
    """The next pickle of a file, and the storages that it mentions."""
    unpickler = _Unpickler(file)
    try:
        return unpickler.load(), unpickler.storages
    except (InvalidFileError, MemoryError):
        raise
    except Exception as error:  # damaged pickles raise nearly anything
        raise InvalidFileError(f"its pickle is damaged ({type(error).__name__})") from error


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Reads a file of `torch.save` as a state dict: parameters and persistent buffers by dotted names.

    Raises `InvalidFileError` if it is damaged, hostile or unknown.
    """
    check_container(path)
    root, read_storage = (_read_archive if is_archive(path) else _read_legacy)(path)
    named = dict(_named(root))
    if not named:
        raise InvalidFileError("it holds no tensors")
    size = path.stat().st_size
    if sum(math.prod(t.shape) * t.storage.dtype.itemsize for t in named.values()) > 2 * size:
        raise InvalidFileError("its tensors are larger than the file")
    return {name: _materialise(name, tensor, read_storage) for name, tensor in named.items()}


def is_archive(path: Path) -> bool:
    """Whether a file is in the zip container, by PyTorch's own test."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def check_container(path: Path) -> None:
    """Refuses decompression bombs and other containers than PyTorch's with an `InvalidFileError`.

    `torch.save` does not compress, so the members of an archive together are no larger than the archive.
    """
    if not is_archive(path):
        with path.open("rb") as file:
            if file.read(1) != pickle.PROTO:
                raise InvalidFileError("it was not written by torch.save")
        return
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:  # unknown versions
        raise InvalidFileError("its archive is damaged") from error
    if len(members) > _MAX_MEMBERS:
        raise InvalidFileError(f"its archive has {len(members)} members")
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            raise InvalidFileError("its archive is compressed or encrypted, which torch.save never does")
    if sum(member.file_size for member in members) > path.stat().st_size:
        raise InvalidFileError("the members of its archive are larger than the archive")


def _read_archive(path: Path) -> tuple[Any, Callable[[_Storage], bytes]]:
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        roots = [n[: -len("data.pkl")] for n in archive.namelist() if n.endswith("/data.pkl")]
        if len(roots) != 1 or roots[0].count("/") != 1:
            raise InvalidFileError("it is not a file of torch.save: its archive has no data.pkl, or several")
        (root,) = roots
        if archive.getinfo(f"{root}data.pkl").file_size > _MAX_PICKLE_BYTES:
            raise InvalidFileError("its pickle is too large")
        if f"{root}byteorder" in names and _read_member(archive, f"{root}byteorder") != b"little":
            raise InvalidFileError("its numbers are big-endian")
        tree, _ = _unpickle(io.BytesIO(_read_member(archive, f"{root}data.pkl")))

    def read_storage(storage: _Storage) -> bytes:
        with zipfile.ZipFile(path) as archive:
            return _read_member(archive, f"{root}data/{storage.key}")

    return tree, read_storage


def _read_member(archive: zipfile.ZipFile, name: str) -> bytes:
    try:
        return archive.read(name)
    # ValueError, OSError and RuntimeError: what zipfile raises for damaged members besides BadZipFile.
    except (KeyError, zipfile.BadZipFile, EOFError, OSError, ValueError, RuntimeError) as error:
        raise InvalidFileError(f"its member {name!a} is missing or damaged") from error


def _read_legacy(path: Path) -> tuple[Any, Callable[[_Storage], bytes]]:
    with path.open("rb") as file:
        (magic, _), (protocol, _), (system, _) = _unpickle(file), _unpickle(file), _unpickle(file)
        if (magic, protocol) != (LEGACY_MAGIC, _LEGACY_PROTOCOL):
            raise InvalidFileError("it was not written by torch.save")
        if not isinstance(system, dict) or system.get("little_endian") is not True:
            raise InvalidFileError("its numbers are big-endian")
        tree, storages = _unpickle(file)
        keys, _ = _unpickle(file)
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise InvalidFileError("its list of storages is damaged")
        # The size of a storage in bytes depends on its dtype, which only the pickle states.
        offsets: dict[str, int] = {}
        for key in keys:
            storage = storages.get(key)
            head = file.read(8)
            if storage is None or len(head) != 8 or struct.unpack("<q", head)[0] != storage.count:
                raise InvalidFileError("its storages are cut short or damaged")
            offsets[key] = file.tell()
            if file.seek(storage.count * storage.dtype.itemsize, io.SEEK_CUR) > path.stat().st_size:
                raise InvalidFileError("its storages are cut short or damaged")

    def read_storage(storage: _Storage) -> bytes:
        if storage.key not in offsets:
            raise InvalidFileError("a storage is missing")
        with path.open("rb") as file:
            file.seek(offsets[storage.key])
            return file.read(min(storage.count * storage.dtype.itemsize, path.stat().st_size))

    return tree, read_storage


def _named(tree: Any) -> Iterator[tuple[str, _Tensor]]:
    """Yields the tensors of a state dict or a module tree, named as by `Module.state_dict`."""
    pending, visited = [("", tree, 0)], 0
    while pending:
        prefix, node, depth = pending.pop()
        visited += 1
        if (
            depth > _MAX_DEPTH or visited > _MAX_MEMBERS
        ):  # modules may form cycles, or share a child many times
            raise InvalidFileError("its modules are nested too deeply")
        if isinstance(node, _Stub):
            transient = node.attributes.get("_non_persistent_buffers_set") or ()
            for kind in ("_parameters", "_buffers"):
                for name, value in _items(node.attributes.get(kind)):
                    if isinstance(value, _Tensor) and name not in transient:
                        yield f"{prefix}{name}", value
            children = _items(node.attributes.get("_modules"))
            pending += [(f"{prefix}{name}.", child, depth + 1) for name, child in children]
        elif isinstance(node, Mapping):
            for name, value in _items(node):
                if not isinstance(value, _Tensor):
                    raise InvalidFileError(f"its entry {ascii(name)[:80]} is not a tensor")
                yield f"{prefix}{name}", value
        elif node is not None:
            raise InvalidFileError("it is neither a module nor a dict of tensors")


def _items(node: Any) -> Iterator[tuple[str, Any]]:
    if node is None:
        return
    if not isinstance(node, Mapping):
        raise InvalidFileError("a module's attributes are damaged")
    for name, value in node.items():
        if not isinstance(name, str):
            raise InvalidFileError("the name of a tensor is not a string")
        yield name, value


def _materialise(name: str, tensor: _Tensor, read_storage: Callable[[_Storage], bytes]) -> torch.Tensor:
    count = math.prod(tensor.shape)
    last = tensor.offset + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride, strict=False))
    if len(tensor.shape) != len(tensor.stride) or count > tensor.storage.count:
        raise InvalidFileError(f"{ascii(name)[:80]} is larger than its storage")
    if count and last >= tensor.storage.count:
        raise InvalidFileError(f"{ascii(name)[:80]} ends outside its storage")
    data = read_storage(tensor.storage)
    if len(data) != tensor.storage.count * tensor.storage.dtype.itemsize:
        raise InvalidFileError(f"the storage of {ascii(name)[:80]} is cut short")
    if not count:
        return torch.empty(tensor.shape, dtype=tensor.storage.dtype)
    flat = torch.frombuffer(bytearray(data), dtype=tensor.storage.dtype)
    return flat.as_strided(tensor.shape, tensor.stride, tensor.offset).clone(
        memory_format=torch.contiguous_format
    )

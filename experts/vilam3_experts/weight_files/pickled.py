"""Reads the tensors of a pickled PyTorch module without executing anything of it.

`torch.load(weights_only=True)` reads state dicts and refuses modules. Releases of torchxrayvision are whole
modules, so this reader stands in for it: classes become inert stand-ins that keep their attributes and have
no methods of their own, tensors are built from their storages by hand, and every other global is refused by
name. Only `quarantine` calls it, in a process of its own.

Both containers of `torch.save` are read: the zip archive, and the older sequence of pickles followed by raw
storages (torch/serialization.py documents both).
"""

from __future__ import annotations

import collections
import dataclasses
import io
import math
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_MAX_PICKLE_BYTES = 64 << 20
_MAX_MEMBERS = 100_000
_MAX_DEPTH = 64


class Refused(ValueError):
    """The file is damaged, hostile, or nothing that this reader knows."""


@dataclasses.dataclass(frozen=True)
class _Storage:
    """A run of numbers in the file, not read yet."""

    dtype: torch.dtype
    key: str
    count: int


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A view of a storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Inert:
    """Stands in for an object of the file. It holds the attributes and does nothing."""

    def __new__(cls, *args: object, **kwargs: object) -> _Inert:
        del args, kwargs
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        del args, kwargs
        self.attributes: dict[str, Any] = {}

    def __setstate__(self, state: object) -> None:
        self.attributes = state if isinstance(state, dict) else {}


def _rebuild_tensor(storage: object, offset: object, shape: object, stride: object, *_: object) -> _Tensor:
    numbers = (offset, *_integers(shape), *_integers(stride))
    if not isinstance(storage, _Storage) or any(type(n) is not int or n < 0 for n in numbers):
        raise Refused("a tensor's description is damaged")
    return _Tensor(storage, numbers[0], _integers(shape), _integers(stride))  # type: ignore[arg-type]


def _integers(value: object) -> tuple[Any, ...]:
    if not isinstance(value, tuple | list):
        raise Refused("a tensor's shape is damaged")
    return tuple(value)


def _rebuild_parameter(data: object, *_: object) -> object:
    return data


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
_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    **{("torch", f"{name}Storage"): dtype for name, dtype in _DTYPES.items()},
}
_STAND_INS = {
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
    """Finds stand-ins only.

    Attributes:
      storages: every storage that the pickle mentions, by key.
    """

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        if name in _STAND_INS.get(module, ()):
            return type(name, (_Inert,), {})
        raise Refused(f"it asks for {ascii(module)[1:-1]}.{ascii(name)[1:-1]}, which no weights need")

    def persistent_load(self, pid: Any) -> Any:
        match pid:
            case ("module", kind, *_) if isinstance(kind, type) and issubclass(kind, _Inert):
                return kind  # the older container adds the source text of classes
            case ("storage", torch.dtype() as dtype, str() as key, _, int() as count, *view):
                storage = _Storage(dtype, key, count)
                known = self.storages.setdefault(key, storage)
                if count >= 0 and view in ([], [None]) and known == storage:
                    return storage
        raise Refused("it refers to a storage in an unknown way")


def _unpickle(file: BinaryIO) -> tuple[Any, dict[str, _Storage]]:
    """The next pickle of a file, and the storages that it mentions."""
    unpickler = _Unpickler(file)
    try:
        return unpickler.load(), unpickler.storages
    except (Refused, MemoryError):
        raise
    except Exception as error:  # damaged pickles raise nearly anything
        raise Refused(f"its pickle is damaged ({type(error).__name__})") from error


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Reads the tensors of a pickled module or state dict.

    Args:
      path: a file of `torch.save`.

    Returns:
      The state dict: parameters and persistent buffers by their dotted names.

    Raises:
      Refused: damaged, hostile or unknown.
    """
    check_container(path)
    if is_archive(path):
        root, storages = _read_archive(path)
    else:
        root, storages = _read_legacy(path)
    named = dict(_named(root))
    if not named:
        raise Refused("it holds no tensors")
    size = path.stat().st_size
    if sum(math.prod(t.shape) * t.storage.dtype.itemsize for t in named.values()) > 2 * size:
        raise Refused("its tensors are larger than the file")
    return {name: _materialise(name, tensor, storages) for name, tensor in named.items()}


def is_archive(path: Path) -> bool:
    """Whether a file is of the zip container, as PyTorch tells the two apart."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def check_container(path: Path) -> None:
    """Refuses archives that grow when they are read.

    `torch.save` compresses nothing, so an archive's members are together no larger than the archive.

    Raises:
      Refused: neither of PyTorch's containers, or a member is compressed, encrypted or overlaps others.
    """
    if not is_archive(path):
        with path.open("rb") as file:
            if file.read(1) != pickle.PROTO:
                raise Refused("it is no file of torch.save")
        return
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise Refused("its archive is damaged") from error
    if len(members) > _MAX_MEMBERS:
        raise Refused(f"its archive has {len(members)} members")
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            raise Refused("its archive is compressed or encrypted, which torch.save never does")
    if sum(member.file_size for member in members) > path.stat().st_size:
        raise Refused("the members of its archive are larger than the archive")


def _read_archive(path: Path) -> tuple[Any, Callable[[_Storage], bytes]]:
    with zipfile.ZipFile(path) as archive:
        roots = [n[: -len("data.pkl")] for n in archive.namelist() if n.endswith("/data.pkl")]
        if len(roots) != 1 or roots[0].count("/") != 1:
            raise Refused("it is no file of torch.save: its archive holds no data.pkl, or several")
        (root,) = roots
        if archive.getinfo(f"{root}data.pkl").file_size > _MAX_PICKLE_BYTES:
            raise Refused("its pickle is too large")
        names = set(archive.namelist())
        if f"{root}byteorder" in names and _read_member(archive, f"{root}byteorder") != b"little":
            raise Refused("its numbers are big-endian")
        tree, _ = _unpickle(io.BytesIO(_read_member(archive, f"{root}data.pkl")))

    def storage(wanted: _Storage) -> bytes:
        with zipfile.ZipFile(path) as archive:
            return _read_member(archive, f"{root}data/{wanted.key}")

    return tree, storage


def _read_member(archive: zipfile.ZipFile, name: str) -> bytes:
    try:
        return archive.read(name)
    except (
        KeyError,
        zipfile.BadZipFile,
        EOFError,
        OSError,
        ValueError,
        NotImplementedError,
        RuntimeError,
    ) as error:
        raise Refused(f"its member {name!a} is missing or damaged") from error


def _read_legacy(path: Path) -> tuple[Any, Callable[[_Storage], bytes]]:
    with path.open("rb") as file:
        (magic, _), (protocol, _), (system, _) = _unpickle(file), _unpickle(file), _unpickle(file)
        if (magic, protocol) != (LEGACY_MAGIC, _LEGACY_PROTOCOL):
            raise Refused("it is no file of torch.save")
        if not isinstance(system, dict) or system.get("little_endian") is not True:
            raise Refused("its numbers are big-endian")
        tree, kinds = _unpickle(file)
        keys, _ = _unpickle(file)
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise Refused("its list of storages is damaged")
        start = file.tell()

    # A storage's size in bytes depends on its dtype, which only the pickle knows.
    places: dict[str, int] = {}
    with path.open("rb") as file:
        file.seek(start)
        for key in keys:
            kind = kinds.get(key)
            head = file.read(8)
            if kind is None or len(head) != 8 or struct.unpack("<q", head)[0] != kind.count:
                raise Refused("its storages are cut short or damaged")
            places[key] = file.tell()
            if file.seek(kind.count * kind.dtype.itemsize, io.SEEK_CUR) > path.stat().st_size:
                raise Refused("its storages are cut short or damaged")

    def storage(wanted: _Storage) -> bytes:
        if wanted.key not in places:
            raise Refused("a storage is missing")
        with path.open("rb") as file:
            file.seek(places[wanted.key])
            return file.read(min(wanted.count * wanted.dtype.itemsize, path.stat().st_size))

    return tree, storage


def _named(tree: Any) -> Iterator[tuple[str, _Tensor]]:
    """Yields the tensors of a state dict or a module tree, as `Module.state_dict` names them."""
    waiting, seen = [("", tree, 0)], 0
    while waiting:
        prefix, node, depth = waiting.pop()
        seen += 1
        if depth > _MAX_DEPTH or seen > _MAX_MEMBERS:  # modules may hold each other, or one child many times
            raise Refused("its modules are nested too deeply")
        if isinstance(node, _Inert):
            transient = node.attributes.get("_non_persistent_buffers_set") or ()
            for kind in ("_parameters", "_buffers"):
                for name, value in _items(node.attributes.get(kind)):
                    if isinstance(value, _Tensor) and name not in transient:
                        yield f"{prefix}{name}", value
            children = _items(node.attributes.get("_modules"))
            waiting += [(f"{prefix}{name}.", child, depth + 1) for name, child in children]
        elif isinstance(node, Mapping):
            for name, value in _items(node):
                if not isinstance(value, _Tensor):
                    raise Refused(f"its entry {ascii(name)[:80]} is no tensor")
                yield f"{prefix}{name}", value
        elif node is not None:
            raise Refused("it is neither a module nor a dict of tensors")


def _items(node: Any) -> Iterator[tuple[str, Any]]:
    if node is None:
        return
    if not isinstance(node, Mapping):
        raise Refused("a module's attributes are damaged")
    for name, value in node.items():
        if not isinstance(name, str):
            raise Refused("a tensor's name is no text")
        yield name, value


def _materialise(name: str, tensor: _Tensor, storages: Callable[[_Storage], bytes]) -> torch.Tensor:
    count = math.prod(tensor.shape)
    last = tensor.offset + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride, strict=False))
    if len(tensor.shape) != len(tensor.stride) or count > tensor.storage.count:
        raise Refused(f"{ascii(name)[:80]} is larger than its storage")
    if count and last >= tensor.storage.count:
        raise Refused(f"{ascii(name)[:80]} ends outside its storage")
    data = storages(tensor.storage)
    if len(data) != tensor.storage.count * tensor.storage.dtype.itemsize:
        raise Refused(f"the storage of {ascii(name)[:80]} is cut short")
    if not count:
        return torch.empty(tensor.shape, dtype=tensor.storage.dtype)
    flat = torch.frombuffer(bytearray(data), dtype=tensor.storage.dtype)
    return flat.as_strided(tensor.shape, tensor.stride, tensor.offset).clone(
        memory_format=torch.contiguous_format
    )

"""PyTorch files (`.pt`, `.bin`, `.pth`) read as weights only; nothing in them is executed.

`torch.save` writes a pickle whose tensors refer to raw storages kept beside it. Python's unpickler
imports and calls whatever a pickle names, so it is not used: the machine below interprets the few
opcodes that hold data, and a name outside `_REBUILD` and `_STORAGES` is an error before anything
happens. Tensors are read when asked for.

Sources: Python's pickletools (opcodes); PyTorch's file formats: a zip archive `NAME/data.pkl`,
`NAME/data/KEY` (1.6 and later) and, before, five pickles followed by the raw storages.
"""

from __future__ import annotations

import io
import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001

# Storage class -> (dtype of its bytes, dtype of the array). MLX's GPU has no float64, numpy no
# bfloat16.
_STORAGES: dict[str, tuple[str, mx.Dtype]] = {
    "torch.FloatStorage": ("<f4", mx.float32), "torch.HalfStorage": ("<f2", mx.float16),
    "torch.BFloat16Storage": ("<u2", mx.bfloat16), "torch.DoubleStorage": ("<f8", mx.float32),
    "torch.ByteStorage": ("<u1", mx.uint8), "torch.CharStorage": ("<i1", mx.int8),
    "torch.ShortStorage": ("<i2", mx.int16), "torch.IntStorage": ("<i4", mx.int32),
    "torch.LongStorage": ("<i8", mx.int64), "torch.BoolStorage": ("?", mx.bool_),
}  # fmt: skip


class UnsafeFile(ValueError):
    """The pickle asks for something that is not data."""


@dataclass(frozen=True, slots=True)
class Name:
    """A global the pickle may mention: only a label here, never the object of that name."""

    path: str


@dataclass(frozen=True, slots=True)
class Storage:
    """Raw bytes of one dtype, shared by any number of tensors."""

    read: Callable[[str], bytes]
    key: str
    kind: str
    size: int
    start: int = 0
    """First value of this view (legacy files only)."""


@dataclass(frozen=True, slots=True)
class TorchTensor:
    """A tensor of the file, not read yet. `shape` and `stride` count values."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def dtype(self) -> mx.Dtype:
        """Of the array that `array` returns."""
        return _STORAGES[self.storage.kind][1]

    @property
    def size(self) -> int:
        return prod(self.shape)

    def array(self) -> mx.array:
        """Read it. float64 becomes float32.

        Raises:
            ValueError: its bytes are missing or damaged.
        """
        code, dtype = _STORAGES[self.storage.kind]
        values = np.frombuffer(self.storage.read(self.storage.key), dtype=code)
        start = self.storage.start + self.offset
        steps = [step * values.itemsize for step in self.stride]
        last = start + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))
        if self.size and last >= len(values):
            raise ValueError(
                f"a tensor of shape {self.shape} reaches past its storage of {len(values)} values"
            )
        view = np.lib.stride_tricks.as_strided(values[start:], self.shape, steps)
        if dtype == mx.bfloat16:
            return mx.array(view).view(mx.bfloat16)
        return mx.array(view.astype(np.float32) if code == "<f8" else view)


def _ints(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple) or not all(isinstance(v, int) and v >= 0 for v in values):
        raise ValueError("sizes and strides must be tuples of non-negative integers")
    return values


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> TorchTensor:
    """torch._utils._rebuild_tensor[_v2]; gradient flag and hooks do not matter here."""
    if not isinstance(storage, Storage) or not isinstance(offset, int) or offset < 0:
        raise ValueError("a tensor needs a storage and an offset")
    tensor = TorchTensor(storage, offset, _ints(shape), _ints(stride))
    if len(tensor.shape) != len(tensor.stride) or tensor.size > storage.size:
        raise ValueError(f"a tensor of shape {shape}, strides {stride} cannot lie in {storage.size} values")
    return tensor


# The only calls a file may ask for, and what is done instead.
_REBUILD: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch.Size": lambda sizes=(): tuple(sizes),
    "collections.OrderedDict": lambda pairs=(): dict(pairs),
}
_CONSTANTS = {
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "INT", "LONG", "BINFLOAT", "BINUNICODE",
    "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES",
}  # fmt: skip
_FIXED: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple,
}  # fmt: skip
_MARK = object()
# What zipfile, pickletools and the machine raise on bytes that make no sense.
_DAMAGE = (
    ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, EOFError, OSError,
    MemoryError, RuntimeError, struct.error, zipfile.BadZipFile,
)  # fmt: skip


def _name(module: str, name: str) -> Name:
    path = f"{module}.{name}"
    if path not in _REBUILD and path not in _STORAGES:
        raise UnsafeFile(
            f"asks for {path}, which is not a tensor: only weights are read, no code is run. "
            "Save the model's state_dict() with torch.save, or as safetensors"
        )
    return Name(path)


class _Machine:
    """Interprets a pickle of tensors, containers and constants."""

    def __init__(self, load: Callable[[Any], Storage]) -> None:
        self.load = load
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, data: BinaryIO) -> Any:
        """The value of the pickle at `data`'s position, which ends up behind it."""
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return self.stack.pop()
            self.step(opcode.name, argument)
        raise ValueError("the pickle has no end")

    def step(self, op: str, argument: Any) -> None:
        stack = self.stack
        if op in _CONSTANTS:
            stack.append(argument)
        elif op in _FIXED:
            stack.append(_FIXED[op]())
        elif op in ("BINPUT", "LONG_BINPUT", "MEMOIZE", "PUT"):
            self.memo[len(self.memo) if argument is None else int(argument)] = stack[-1]
        elif op in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(self.memo[int(argument)])
        elif op == "MARK":
            stack.append(_MARK)
        elif op not in ("PROTO", "FRAME") and not self.call(op, argument):
            self.collect(op)

    def call(self, op: str, argument: Any) -> bool:
        """Opcodes by which a pickle would name and call things; False for any other."""
        stack = self.stack
        if op == "GLOBAL":
            stack.append(_name(*argument.split(" ", 1)))
        elif op == "STACK_GLOBAL":
            name, module = stack.pop(), stack.pop()
            stack.append(_name(str(module), str(name)))
        elif op == "BINPERSID":
            stack.append(self.load(stack.pop()))
        elif op == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            if not isinstance(function, Name) or function.path not in _REBUILD:
                raise UnsafeFile("calls something that does not rebuild a tensor")
            stack.append(_REBUILD[function.path](*arguments))
        else:
            return False
        return True

    def collect(self, op: str) -> None:
        """Opcodes that fill containers."""
        stack = self.stack
        if op == "TUPLE":
            stack.append(tuple(self.since_mark()))
        elif op in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(op[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif op in ("SETITEMS", "SETITEM"):
            items = self.since_mark() if op == "SETITEMS" else [stack.pop(-2), stack.pop()]
            for key, value in zip(items[::2], items[1::2], strict=True):
                self.top(dict)[key] = value
        elif op in ("APPENDS", "APPEND"):
            items = self.since_mark() if op == "APPENDS" else [stack.pop()]
            self.top(list).extend(items)
        elif op == "BUILD":  # the attribute _metadata of a state dict: versions of modules
            stack.pop()
            self.top(dict)
        else:
            raise UnsafeFile(f"uses the pickle opcode {op}, which no file of weights needs")

    def since_mark(self) -> list[Any]:
        items = []
        while (item := self.stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def top(self, kind: type) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise ValueError(f"the pickle fills a {type(self.stack[-1]).__name__} as a {kind.__name__}")
        return self.stack[-1]


def _storage(key: Any, read: Callable[[str], bytes]) -> Storage:
    """A persistent id: ("storage", class, key, device, size[, view (legacy files only)])."""
    label, kind, name, _, size, *view = key
    if label != "storage" or not isinstance(kind, Name) or kind.path not in _STORAGES:
        raise ValueError("a storage is described in an unknown way")
    if not isinstance(name, str) or not isinstance(size, int):
        raise ValueError("a storage needs a name and a size")
    if view and view[0] is not None:
        _, start, size = view[0]
        return Storage(read, name, kind.path, size, *_ints((start,)))
    return Storage(read, name, kind.path, size)


class _Zip:
    """The archive of PyTorch 1.6 and later. Keeps the last storage read: tensors may share one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with zipfile.ZipFile(path) as archive:
            pickles = [n for n in archive.namelist() if n.endswith("/data.pkl") and n.count("/") == 1]
            if len(pickles) != 1:
                raise ValueError("it is a zip archive without NAME/data.pkl")
            self.root = pickles[0].removesuffix("/data.pkl")
            self.sizes = {info.filename: info.file_size for info in archive.infolist()}
            self.pickle = self.entry(archive, pickles[0])
            order = f"{self.root}/byteorder"
            if order in self.sizes and self.entry(archive, order) != b"little":
                raise ValueError("it was written on a big-endian machine")
        self.last: tuple[str, bytes] = ("", b"")

    @staticmethod
    def entry(archive: zipfile.ZipFile, name: str) -> bytes:
        info = archive.getinfo(name)
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"its entry {name} is compressed, which torch.save never does")
        if info.CRC == 0:  # written without checksums
            info.CRC = None  # type: ignore[assignment]
        with archive.open(info) as file:
            return file.read()

    def load(self, key: Any) -> Storage:
        storage = _storage(key, self.read)
        width = np.dtype(_STORAGES[storage.kind][0]).itemsize
        if self.sizes.get(f"{self.root}/data/{storage.key}") != storage.size * width:
            raise ValueError(f"its storage {storage.key} is missing or has another size than the pickle says")
        return storage

    def read(self, key: str) -> bytes:
        if self.last[0] != key:
            try:
                with zipfile.ZipFile(self.path) as archive:
                    self.last = (key, self.entry(archive, f"{self.root}/data/{key}"))
            except _DAMAGE as error:
                raise ValueError(f"{self.path} is damaged: {error}") from None
        return self.last[1]


class _Legacy:
    """The format before PyTorch 1.6: magic number, protocol, platform, object, keys, storages."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.widths: dict[str, int] = {}
        self.places: dict[str, tuple[int, int]] = {}

    def load(self, key: Any) -> Storage:
        storage = _storage(key, self.read)
        self.widths[storage.key] = np.dtype(_STORAGES[storage.kind][0]).itemsize
        return storage

    def parse(self) -> Any:
        with self.path.open("rb") as file:
            for expected in (_LEGACY_MAGIC, _LEGACY_PROTOCOL):
                if _Machine(self.load).run(file) != expected:
                    raise ValueError("it does not begin as a PyTorch file")
            platform = _Machine(self.load).run(file)
            if not isinstance(platform, dict) or platform.get("little_endian") is not True:
                raise ValueError("it was written on a big-endian machine")
            value = _Machine(self.load).run(file)
            keys = _Machine(self.load).run(file)
            size = self.path.stat().st_size
            for key in keys:
                (count,) = struct.unpack("<q", file.read(8))
                self.places[key] = (file.tell(), count * self.widths[key])
                file.seek(self.places[key][1], io.SEEK_CUR)
                if not 0 <= file.tell() <= size:
                    raise ValueError("it is cut short")
        if self.widths.keys() - self.places.keys():
            raise ValueError("storages are missing")
        return value

    def read(self, key: str) -> bytes:
        start, size = self.places[key]
        with self.path.open("rb") as file:
            file.seek(start)
            return file.read(size)


def _state_dict(value: Any) -> dict[str, TorchTensor]:
    """The one dictionary of tensors in what was saved: itself, or a value such as "state_dict"."""

    def tensors(item: Any) -> dict[str, TorchTensor]:
        pairs = item.items() if isinstance(item, dict) else ()
        return {k: v for k, v in pairs if isinstance(k, str) and isinstance(v, TorchTensor)}

    if found := tensors(value):
        return found
    inner: Iterator[Any] = iter(value.values() if isinstance(value, dict) else ())
    candidates = [found for item in inner if (found := tensors(item))]
    if len(candidates) != 1:
        raise ValueError(f"it holds {len(candidates)} dictionaries of tensors, where one is expected")
    return candidates[0]


def read_torch(path: Path) -> dict[str, TorchTensor]:
    """Names and tensors of a PyTorch file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a PyTorch file, damaged, or asking for more than weights; the path is named.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        if zipfile.is_zipfile(path):
            archive = _Zip(path)
            value = _Machine(archive.load).run(io.BytesIO(archive.pickle))
        else:
            with path.open("rb") as file:
                if file.read(2) == b"PK":
                    raise ValueError("the zip archive is cut short")
            value = _Legacy(path).parse()
        return _state_dict(value)
    except UnsafeFile as error:
        raise UnsafeFile(f"{path} {error}") from None
    except _DAMAGE as error:
        raise ValueError(f"{path} is not a PyTorch file of weights, or is damaged: {error}") from None

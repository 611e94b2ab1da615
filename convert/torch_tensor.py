"""Tensors of a PyTorch file: views of named storages, described by its pickle and read when they are needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import mlx.core as mx
import numpy as np

# Storage class -> (dtype of its bytes, dtype of the array). MLX's GPU has no float64, numpy no bfloat16.
STORAGES: dict[str, tuple[str, mx.Dtype]] = {
    "torch.FloatStorage": ("<f4", mx.float32), "torch.HalfStorage": ("<f2", mx.float16),
    "torch.BFloat16Storage": ("<u2", mx.bfloat16), "torch.DoubleStorage": ("<f8", mx.float32),
    "torch.ByteStorage": ("<u1", mx.uint8), "torch.CharStorage": ("<i1", mx.int8),
    "torch.ShortStorage": ("<i2", mx.int16), "torch.IntStorage": ("<i4", mx.int32),
    "torch.LongStorage": ("<i8", mx.int64), "torch.BoolStorage": ("?", mx.bool_),
}  # fmt: skip

_MAX_DIMENSIONS = 32
_MAX_SIZE = (1 << 31) - 1  # of one dimension, as MLX has it


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
    """Values in it."""
    start: int = 0
    """First value of this view (legacy files only)."""

    @property
    def width(self) -> int:
        """Bytes of a value."""
        return np.dtype(STORAGES[self.kind][0]).itemsize


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
        return STORAGES[self.storage.kind][1]

    @property
    def size(self) -> int:
        """Number of values."""
        return prod(self.shape)

    def array(self) -> mx.array:
        """Read it. float64 becomes float32, infinite where float32 cannot hold the value.

        Raises:
            ValueError: its bytes are missing or damaged.
        """
        code, dtype = STORAGES[self.storage.kind]
        if not self.size:
            return mx.zeros(self.shape, dtype=dtype)
        values = np.frombuffer(self.storage.read(self.storage.key), dtype=code)
        start = self.storage.start + self.offset
        if start + _reach(self.shape, self.stride) > len(values):
            raise ValueError(
                f"a tensor of shape {self.shape} reaches past its storage of {len(values)} values"
            )
        steps = [
            step * values.itemsize if n > 1 else 0 for n, step in zip(self.shape, self.stride, strict=True)
        ]
        view = np.lib.stride_tricks.as_strided(values[start:], self.shape, steps)
        if dtype == mx.bfloat16:
            return mx.array(view).view(mx.bfloat16)
        with np.errstate(over="ignore"):
            return mx.array(view.astype(np.float32) if code == "<f8" else view)


def _reach(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Values from a tensor's first to its last one, both counted."""
    return 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))


def _ints(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple) or len(values) > _MAX_DIMENSIONS:
        raise ValueError(f"sizes and strides must be tuples of at most {_MAX_DIMENSIONS} integers")
    if not all(type(value) is int and 0 <= value <= _MAX_SIZE for value in values):
        raise ValueError(f"sizes and strides must be integers from 0 to {_MAX_SIZE}")
    return values


def rebuilt_tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> TorchTensor:
    """torch._utils._rebuild_tensor[_v2]; gradient flag and hooks do not matter here."""
    if not isinstance(storage, Storage) or type(offset) is not int or offset < 0:
        raise ValueError("a tensor needs a storage and an offset")
    tensor = TorchTensor(storage, offset, _ints(shape), _ints(stride))
    if len(tensor.shape) != len(tensor.stride):
        raise ValueError(f"a tensor has the shape {shape} and the strides {stride}")
    if tensor.size and max(tensor.size, offset + _reach(tensor.shape, tensor.stride)) > storage.size:
        raise ValueError(f"a tensor of shape {shape}, strides {stride} cannot lie in {storage.size} values")
    return tensor


def described_storage(key: tuple[Any, ...], read: Callable[[str], bytes]) -> Storage:
    """The storage of a persistent id: ("storage", class, key, device, size[, view (legacy files only)]).

    Raises:
        ValueError: it is described in another way.
    """
    label, kind, name, _, size, *view = key
    if label != "storage" or not isinstance(kind, Name) or kind.path not in STORAGES:
        raise ValueError("a storage is described in an unknown way")
    if view and view[0] is not None:
        _, start, size = view[0]
    else:
        start = 0
    if type(name) is not str or not all(type(n) is int and 0 <= n < 1 << 62 for n in (size, start)):
        raise ValueError("a storage needs a name and a size")
    return Storage(read, name, kind.path, size, start)

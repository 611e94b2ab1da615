"""A GGUF's tensors as arrays of MLX: as they are where MLX has their type, packed anew where it has not.

Letters: R rows (all dimensions but the last), C columns, G columns of a group (32). MLX keeps quantized values as
whole numbers q of `bits` bits, in the order of the columns, the lowest bits first, and a scale and a bias for each
group: a value is scale * q + bias. What ggml's types hold is in ggml's ggml-common.h and ggml-quants.c; those that MLX
has not are decoded by the `gguf` package.
"""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from .reader import TENSOR_TYPES, Place

GROUP_SIZE = 32
PIECE = 1 << 20
"""Values that are decoded at once"""
FLOATS = frozenset({"F32", "F16", "BF16", "F64"})
NATIVE = frozenset({"Q4_0", "Q4_1", "Q8_0", "MXFP4"})
"""Types that stay packed, bit for bit."""

BITS = {
    "Q5_0": 5, "Q5_1": 5, "Q4_K": 4, "Q5_K": 5, "TQ1_0": 2, "TQ2_0": 2,
    "Q6_K": 8, "NVFP4": 6, "Q3_K": 6, "IQ4_NL": 6, "IQ4_XS": 6, "IQ3_S": 6, "IQ3_XXS": 6,
}  # fmt: skip
"""Bits of a value for other types. Those of the first line have one scale and bias in a group of 32, so their whole
numbers are kept and only the scales are rounded, to float16; a group of the others holds two scales of theirs or more,
so they get more bits than they have."""

FEWEST_BITS = 4
"""Of all others: types of two bits and less"""


@dataclass(frozen=True, slots=True)
class Packed:
    """A tensor in one of MLX's quantized forms."""

    weight: mx.array
    """(..., C * bits / 32) uint32"""
    scales: mx.array
    """(..., C / G) float16; of "mxfp4" uint8"""
    biases: mx.array | None
    """(..., C / G) float16"""
    bits: int
    mode: str = "affine"

    @property
    def parts(self) -> dict[str, mx.array]:
        """By the names that mlx-lm's layers have for them."""
        parts = {"weight": self.weight, "scales": self.scales}
        return parts if self.biases is None else {**parts, "biases": self.biases}

    def dense(self) -> mx.array:
        """(..., C)"""
        return mx.dequantize(
            self.weight, self.scales, self.biases, group_size=GROUP_SIZE, bits=self.bits, mode=self.mode
        )


@dataclass(slots=True)
class PackingError:
    """How far tensors packed anew are from those of the file."""

    count: int = 0
    absolute: float = 0.0
    squares: float = 0.0
    largest: float = 0.0

    def add(self, wanted: np.ndarray, packed: Packed) -> None:
        """Compare a tensor's values, float32, with what was packed."""
        got = np.array(packed.dense().astype(mx.float32)).reshape(wanted.shape)
        difference = np.abs(got - wanted)
        self.count += wanted.size
        self.absolute += float(difference.sum(dtype=np.float64))
        self.squares += float(np.square(wanted, dtype=np.float64).sum())
        self.largest = max(self.largest, float(difference.max()))

    def __str__(self) -> str:
        size = math.sqrt(self.squares / max(self.count, 1))
        mean = self.absolute / max(self.count, 1)
        return f"mean error {mean:.2g}, largest {self.largest:.2g}, where weights are {size:.2g} (root mean square)"


def _bytes_of(place: Place, kind: str) -> np.ndarray:
    """A tensor's bytes, (blocks, bytes of a block) uint8, mapped."""
    data = np.memmap(place.path, dtype=np.uint8, mode="r", offset=place.offset, shape=(place.size,))
    return data.reshape(-1, _block_size(kind))


def _block_size(kind: str) -> int:
    return next(size for name, _, size in TENSOR_TYPES.values() if name == kind)


def read_float(place: Place, shape: tuple[int, ...], kind: str) -> mx.array:
    """A tensor of floating numbers in its own dtype; float64 becomes float32."""
    data = _bytes_of(place, kind)
    if kind == "BF16":
        return mx.array(data.view(np.uint16).reshape(shape)).view(mx.bfloat16)
    dtype: Any = {"F32": np.float32, "F16": np.float16, "F64": np.float64}[kind]
    values = data.view(dtype).reshape(shape)
    with np.errstate(
        over="ignore"
    ):  # what float32 cannot hold becomes infinite, which loading refuses by name
        return mx.array(values.astype(np.float32) if kind == "F64" else values)


def read_packed(place: Place, shape: tuple[int, ...], kind: str) -> Packed:
    """A tensor of one of the `NATIVE` types, bit for bit."""
    data = _bytes_of(place, kind)
    if kind == "MXFP4":
        return Packed(_words(_in_order(data[:, 1:]), shape), _groups(data[:, 0], shape), None, 4, "mxfp4")
    scales = data[:, :2].copy().view(np.float16)
    if kind == "Q8_0":
        return Packed(_words(data[:, 2:] ^ np.uint8(0x80), shape), *_affine(scales, -128 * scales, shape), 8)
    if kind == "Q4_0":
        return Packed(_words(_in_order(data[:, 2:]), shape), *_affine(scales, -8 * scales, shape), 4)
    biases = data[:, 2:4].copy().view(np.float16)
    return Packed(_words(_in_order(data[:, 4:]), shape), *_affine(scales, biases, shape), 4)


def _in_order(data: np.ndarray) -> np.ndarray:
    """ggml's 32 values of 4 bits, j beside j + 16 in a byte, with neighbors beside each other. (blocks, 16) uint8."""
    pairs = np.ascontiguousarray(data).view("<u2")
    low = (pairs & 15) | (pairs >> 4 & 0xF0)
    high = (pairs >> 4 & 15) | (pairs >> 8 & 0xF0)
    return np.concatenate([low.astype(np.uint8), high.astype(np.uint8)], axis=1)


def _words(data: np.ndarray, shape: tuple[int, ...]) -> mx.array:
    """Bytes of packed values as MLX keeps them: (..., C * bits / 32) uint32."""
    return mx.array(np.ascontiguousarray(data).reshape(*shape[:-1], -1).view(np.uint32))


def _groups(values: np.ndarray, shape: tuple[int, ...]) -> mx.array:
    return mx.array(np.ascontiguousarray(values).reshape(*shape[:-1], -1))


def _affine(scales: np.ndarray, biases: np.ndarray, shape: tuple[int, ...]) -> tuple[mx.array, mx.array]:
    return _groups(scales.astype(np.float16), shape), _groups(biases.astype(np.float16), shape)


def repack(place: Place, shape: tuple[int, ...], kind: str, error: PackingError) -> Packed:
    """A tensor of any other type in the nearest of MLX's forms; adds to `error`.

    It is done in pieces of some rows, so that little of it is in memory as floats, and by several threads.
    """
    rows, columns = math.prod(shape[:-1]), shape[-1]
    data = _bytes_of(place, kind).reshape(rows, -1)
    step, bits = max(1, PIECE // columns), BITS.get(kind, FEWEST_BITS)
    pieces = [data[begin : begin + step] for begin in range(0, rows, step)]
    packed: list[Packed] = []
    workers = min(os.cpu_count() or 1, 8)
    with ThreadPoolExecutor(workers) as pool:
        for begin in range(0, len(pieces), workers):
            for piece in pool.map(
                partial(_repack_rows, kind=kind, bits=bits), pieces[begin : begin + workers]
            ):
                packed.append(piece.packed(bits))  # MLX stays in this thread
                error.add(piece.wanted, packed[-1])
    parts = (
        mx.concatenate([getattr(piece, name) for piece in packed]) for name in ("weight", "scales", "biases")
    )
    weight, scales, biases = (part.reshape(*shape[:-1], -1) for part in parts)
    mx.eval(weight, scales, biases)
    return Packed(weight, scales, biases, bits)


def read_exact(place: Place, shape: tuple[int, ...], kind: str) -> mx.array:
    """A tensor of any other type as the float32 values that the file stands for."""
    import gguf

    data = _bytes_of(place, kind).reshape(math.prod(shape[:-1]), -1)
    return mx.array(gguf.dequantize(data, gguf.GGMLQuantizationType[kind]).reshape(shape))


@dataclass(frozen=True, slots=True)
class _Rows:
    """Some rows packed anew, in numpy's arrays."""

    wanted: np.ndarray
    """(R, C) float32: the values of the file"""
    values: np.ndarray
    """(R * C / 8, bits) uint8"""
    scales: np.ndarray
    biases: np.ndarray
    """(R * C / G, 1) float16 each"""

    def packed(self, bits: int) -> Packed:
        shape = self.wanted.shape
        return Packed(_words(self.values, shape), *_affine(self.scales, self.biases, shape), bits)


def _repack_rows(data: np.ndarray, kind: str, bits: int) -> _Rows:
    """Rows of the file's blocks, (R, bytes of a row) uint8, decoded and packed anew."""
    import gguf

    data = np.asarray(data)
    wanted = gguf.dequantize(data, getattr(gguf.GGMLQuantizationType, kind)).astype(np.float32, copy=False)
    blocks = data.reshape(-1, _block_size(kind))
    scales, biases = (
        part.astype(np.float16) for part in _scales_and_biases(blocks, wanted, kind, 2**bits - 1)
    )
    steps = np.where(scales == 0, np.float32(1), scales)
    values = np.rint((wanted.reshape(-1, GROUP_SIZE) - biases) / steps).clip(0, 2**bits - 1)
    return _Rows(wanted, _bits(values, bits), scales, biases)


def _bits(values: np.ndarray, bits: int) -> np.ndarray:
    """Whole numbers one after the other, the lowest bits first, as bytes. (groups, 32) -> (groups * 4, bits) uint8"""
    octets = values.astype(np.uint64).reshape(-1, 8)  # 8 values fill a whole number of bytes
    joined = np.zeros(len(octets), np.uint64)
    for place in range(8):
        joined |= octets[:, place] << np.uint64(place * bits)
    return joined.astype("<u8").view(np.uint8).reshape(-1, 8)[:, :bits]


def _scales_and_biases(
    data: np.ndarray, wanted: np.ndarray, kind: str, largest: int
) -> tuple[np.ndarray, np.ndarray]:
    """Scale and bias of each group of 32 values, (groups, 1) float32 each: the file's own, or those of a grid from the
    group's least value to its greatest, which is whole number `largest`."""
    if kind in ("TQ1_0", "TQ2_0"):  # -scale, 0 and scale; one scale a block of 256
        scales = data[:, -2:].copy().view(np.float16).astype(np.float32).repeat(8, axis=0)
        return scales, -scales
    halves = data[:, :4].copy().view(np.float16).astype(np.float32)
    if kind == "Q5_0":
        return halves[:, :1], -16 * halves[:, :1]
    if kind == "Q5_1":
        return halves[:, :1], halves[:, 1:]
    if kind in ("Q4_K", "Q5_K"):
        from gguf.quants import Q4_K

        scales, minima = Q4_K.get_scale_min(data[:, 4:16].copy())  # 8 groups a block, 6 bits each
        return (halves[:, :1] * scales).reshape(-1, 1), (-halves[:, 1:] * minima).reshape(-1, 1)
    groups = wanted.reshape(-1, GROUP_SIZE)
    least = groups.min(axis=1, keepdims=True)
    return (groups.max(axis=1, keepdims=True) - least) / largest, least

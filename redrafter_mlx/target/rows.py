"""Quantized rows of a target's output embedding, for drafters whose head they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """Rows of an output embedding (n, H) as `mx.quantize` stores them: packed weights, scales and biases."""

    weight: mx.array
    scales: mx.array
    biases: mx.array | None
    group_size: int
    bits: int
    mode: str

    def __call__(self, x: mx.array) -> mx.array:
        """x (..., H) times the transposed rows -> (..., n)"""
        return mx.quantized_matmul(x, self.weight, self.scales, self.biases, transpose=True, **self._format())

    def dense(self) -> mx.array:
        """The rows dequantized, (n, H)"""
        return mx.dequantize(self.weight, self.scales, self.biases, **self._format())

    @property
    def nbytes(self) -> int:
        """Bytes that one multiplication reads."""
        return sum(part.nbytes for part in (self.weight, self.scales, self.biases) if part is not None)

    def _format(self) -> dict[str, Any]:
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}

"""Whether a target fits into this process, before its weights are read."""

from __future__ import annotations

from pathlib import Path

from redrafter_mlx.device import memory_bytes


def check_fits(path: Path, needed: float) -> None:
    """Check that a target whose weights take `needed` bytes in float32 fits into this process.

    Raises:
        ValueError: it does not.
    """
    if needed > memory_bytes():
        raise ValueError(
            f"{path} is too large for this CPU: dequantized to float32 its weights take about "
            f"{needed / 1e9:.1f} GB, and this process may use {memory_bytes() / 1e9:.1f} GB"
        )

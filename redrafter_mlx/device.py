"""Which device runs, and what follows from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import mlx.core as mx

F = TypeVar("F", bound=Callable[..., Any])


def on_gpu() -> bool:
    """True where MLX runs on Metal or CUDA by default."""
    return bool(mx.default_device() == mx.gpu)


def fused(function: F) -> F:
    """`mx.compile` on a GPU, where each operation is a launch.

    On the CPU the function stays as it is: compiling there calls g++ for seconds to save microseconds.
    """
    return cast(F, mx.compile(function)) if on_gpu() else function


def device_name() -> str:
    """The chip, as MLX or the operating system names it."""
    if on_gpu():
        return str(mx.device_info().get("device_name", "GPU"))
    import platform

    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()

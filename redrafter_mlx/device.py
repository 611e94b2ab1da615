"""Which device runs, and what follows from it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar, cast

import mlx.core as mx

F = TypeVar("F", bound=Callable[..., Any])

PRETEND_GPU = "REDRAFTER_PRETEND_GPU"
"""Environment variable for tests: a GPU's choices, computed by whatever device there is."""


def on_gpu() -> bool:
    """True where MLX runs on Metal or CUDA by default."""
    return bool(mx.default_device() == mx.gpu) or os.environ.get(PRETEND_GPU) == "1"


def fused(function: F) -> F:
    """`mx.compile` on a GPU, where each operation is a launch.

    On the CPU the function runs as it is: compiling there calls g++ for seconds to save microseconds. The device
    is looked up at every call, because a program may change MLX's default device at any time.
    """
    compiled = mx.compile(function)

    @wraps(function)
    def call(*args: Any) -> Any:
        return compiled(*args) if on_gpu() else function(*args)

    return cast(F, call)


def device_name() -> str:
    """The chip, as MLX or the operating system names it."""
    if mx.default_device() == mx.gpu:
        return str(mx.device_info().get("device_name", "GPU"))
    import platform

    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")


def memory_bytes() -> int:
    """Bytes of memory this process may use: the machine's, or the limit of its container or service where less."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in _limit_files():
        try:
            limits.append(int(path.read_text(encoding="ascii")))
        except (OSError, ValueError):  # no such control group, or "max"
            continue
    return min(limits)


def _limit_files() -> Iterator[Path]:
    """The files with a memory limit of this process's control group and of all above it, of both versions of cgroups.

    Inside a container the group may be named as the host sees it, while the container's own is mounted at the root:
    groups that are not there are skipped by the caller.
    """
    try:
        lines = _OWN_CGROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:  # macOS
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if not controllers:
            root, name = _CGROUPS, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = _CGROUPS / "memory", "memory.limit_in_bytes"
        else:
            continue
        own = PurePosixPath(group.lstrip("/"))
        for each in (own, *own.parents):
            yield root / each / name

"""The machine, versions and commit that every figure has to name."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

from redrafter_mlx.device import device_name, on_gpu


def machine() -> dict[str, Any]:
    """Device, chip, system, versions and commit, as JSON values."""
    versions = {name: importlib.metadata.version(name) for name in ("mlx", "mlx-lm")}
    return {
        "device": "gpu" if on_gpu() else "cpu",
        "chip": device_name(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
        "commit": _commit(),
    }


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return result.stdout.strip() or None

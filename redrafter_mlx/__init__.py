"""redrafter-mlx: Apple's Recurrent Drafter in MLX.

A small recurrent head drafts a token tree from the target's last hidden state, the target verifies the
whole tree in one forward, and the agreeing path is kept. See docs/algorithm.md.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .process import guard_imports

guard_imports()

try:
    from .cpu import blas
except ImportError:  # the package works without that folder
    pass
else:
    blas.preload()  # before anything imports mlx.core

if TYPE_CHECKING:
    from .aio import astream_generate as astream_generate
    from .aio import batch as batch
    from .drafters.kinds import load_drafter as load_drafter
    from .drafters.kinds import save_drafter as save_drafter
    from .drafters.recurrent import DrafterConfig as DrafterConfig
    from .drafters.recurrent import RecurrentDrafter as RecurrentDrafter
    from .generation import Chunk as Chunk
    from .generation import generate as generate
    from .generation import stream_generate as stream_generate
    from .loading.load import load as load
    from .model import Model as Model
    from .prompt_cache import PromptCache as PromptCache
    from .sampling import Sampling as Sampling
    from .stats import Stats as Stats
    from .tree import Beam as Beam

__version__ = "0.1.0"

_HOME = {
    "DrafterConfig": "drafters.recurrent", "RecurrentDrafter": "drafters.recurrent",
    "load_drafter": "drafters.kinds", "save_drafter": "drafters.kinds", "Chunk": "generation", "Model": "model",
    "PromptCache": "prompt_cache", "generate": "generation", "batch": "aio", "astream_generate": "aio",
    "stream_generate": "generation", "load": "loading.load", "Sampling": "sampling", "Stats": "stats", "Beam": "tree",
}  # fmt: skip
__all__ = [*_HOME, "__version__"]  # noqa: PLE0604


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    """Import the public names when first used, so that `redrafter --help` does not wait for mlx."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value

"""Where everything but the answer goes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def stderr() -> Console:
    """A rich console on stderr."""
    from rich.console import Console

    return Console(stderr=True)

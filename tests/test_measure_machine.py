"""The machine that figures name."""

from __future__ import annotations

import redrafter_mlx  # noqa: F401  (before mlx)

# isort: split
from redrafter_mlx.measure.machine import machine


def test_machine_names_itself() -> None:
    assert {"device", "chip", "os", "versions", "commit"} <= machine().keys()

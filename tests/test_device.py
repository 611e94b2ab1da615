"""The memory that a process may use: a container's or a service's limit counts, not the machine's pages alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from redrafter_mlx import device

MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
V2, V1 = "memory.max", "memory.limit_in_bytes"


@pytest.mark.parametrize(
    ("own", "limits", "expected"),
    [
        ("0::/\n", {V2: "4096"}, 4096),  # in a container with its own namespace
        ("0::/\n", {V2: "max\n"}, None),
        ("0::/system.slice/chat.service\n", {f"system.slice/chat.service/{V2}": "8192\n"}, 8192),
        ("0::/a/b\n", {f"a/b/{V2}": "8192", f"a/{V2}": "4096", V2: "max"}, 4096),
        ("0::/a/b\n", {f"c/{V2}": "4096"}, None),  # another group's
        ("5:cpu,memory:/docker/1f\n0::/\n", {f"memory/{V1}": "4096"}, 4096),  # as the host names it
        ("5:memory:/job\n", {f"memory/job/{V1}": "4096", f"memory/{V1}": "9223372036854771712"}, 4096),
        ("5:cpu:/job\n", {f"memory/job/{V1}": "4096"}, None),
        (None, {V2: "4096"}, None),
    ],
)
def test_the_smallest_limit_of_the_own_groups_counts(
    own: str | None,
    limits: dict[str, str],
    expected: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`expected` None: the machine's memory."""
    if own is not None:
        (tmp_path / "own").write_text(own)
    for name, text in limits.items():
        file = tmp_path / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.setattr(device, "_OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(device, "_CGROUPS", tmp_path / "cgroup")
    assert device.memory_bytes() == (MACHINE if expected is None else expected)

"""Folders and measurements of the cases."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from redrafter_mlx.auto import timing
from tests.cases.known import KNOWN, NOT_EVERY_TIME
from tests.cases.models import random_model, successor_model

FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All cases are slow; those that are known to be wrong are expected to fail, and must."""
    for item in items:
        if item.path.parent == FOLDER:
            item.add_marker(pytest.mark.slow)
            for beginning, reason in KNOWN.get(item.path.name, {}).items():
                if item.name.startswith(beginning):
                    item.add_marker(pytest.mark.xfail(strict=item.name not in NOT_EVERY_TIME, reason=reason))


@pytest.fixture(autouse=True)
def _measured_here(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cost tables in a folder of the tests, measured in a moment."""
    monkeypatch.setenv("REDRAFTER_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setattr(timing, "BUDGET_SECONDS", 0.05)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights and a drafter. Not to be changed."""
    return random_model(tmp_path_factory.mktemp("random") / "model")


@pytest.fixture(scope="session")
def successor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model whose text is known. Not to be changed."""
    return successor_model(tmp_path_factory.mktemp("successor") / "model")


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Callable[..., Path]:
    """Makes copies of `model`, with or without its drafter."""

    def make(name: str = "copy", drafter: bool = True) -> Path:
        ignored: Any = None if drafter else shutil.ignore_patterns("drafter")
        return Path(shutil.copytree(model, tmp_path / name, ignore=ignored))

    return make

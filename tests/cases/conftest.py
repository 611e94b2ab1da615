"""Folders and measurements of the cases."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from redrafter_mlx.auto import timing
from tests.cases.models import random_model, successor_model

FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All cases are slow."""
    for item in items:
        if item.path.parent == FOLDER:
            item.add_marker(pytest.mark.slow)


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

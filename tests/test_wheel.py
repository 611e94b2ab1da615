"""The wheel: complete, and nothing in it but our own name."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def _setuptools_is_new_enough() -> bool:
    if importlib.util.find_spec("setuptools") is None or importlib.util.find_spec("pip") is None:
        return False
    from importlib.metadata import version

    return int(version("setuptools").split(".")[0]) >= 77


@dataclass(frozen=True)
class Built:
    names: list[str]
    """Files in the wheel."""
    output: str
    """What pip and setuptools said."""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A wheel built from a copy of this checkout, so that no build/ is left here."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("redrafter_mlx", "convert", "apps"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / "src" / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "src" / name)
    command = [sys.executable, "-m", "pip", "wheel", "--verbose", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--wheel-dir", str(folder), str(folder / "src")]
    environment = {
        k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"
    }  # setuptools would warn
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Built(archive.namelist(), output)


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not _setuptools_is_new_enough(), reason="needs pip and setuptools >= 77 to build offline"
    ),
]


def test_the_build_warns_of_nothing(built: Built) -> None:
    said = [line for line in built.output.splitlines() if re.search(r"warn|deprecat|absent", line, re.I)]
    # of this machine's pip, not of the package
    assert [line for line in said if not line.startswith("WARNING: ")] == []


def test_no_generic_top_level_name(built: Built) -> None:
    tops = {name.split("/")[0] for name in built.names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"redrafter_mlx"}


def test_every_module_and_data_file_is_in(built: Built) -> None:
    expected = {"redrafter_mlx/py.typed"}
    for folder, inside in (("redrafter_mlx", ""), ("convert", "convert/"), ("apps", "apps/")):
        for path in (ROOT / folder).rglob("*"):
            name = path.relative_to(ROOT / folder).as_posix()
            if path.is_file() and (path.suffix == ".py" or name.startswith("assets/")):
                expected.add(f"redrafter_mlx/{inside}{name}")
    assert expected == {name for name in built.names if name.startswith("redrafter_mlx/")}

"""The wheel: complete, and nothing in it but our own name."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def _setuptools_is_new_enough() -> bool:
    if importlib.util.find_spec("setuptools") is None or importlib.util.find_spec("pip") is None:
        return False
    from importlib.metadata import version

    return int(version("setuptools").split(".")[0]) >= 77


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The files of a wheel built from a copy of this checkout, so that no build/ is left here."""
    import shutil

    folder = tmp_path_factory.mktemp("wheel")
    for name in ("redrafter_mlx", "convert", "apps"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / "src" / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "src" / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--wheel-dir", str(folder), str(folder / "src")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not _setuptools_is_new_enough(), reason="needs pip and setuptools >= 77 to build offline"
    ),
]


def test_no_generic_top_level_name(names: list[str]) -> None:
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"redrafter_mlx"}


def test_every_module_and_data_file_is_in(names: list[str]) -> None:
    expected = {"redrafter_mlx/py.typed"}
    for folder, inside in (("redrafter_mlx", ""), ("convert", "convert/"), ("apps", "apps/")):
        for path in (ROOT / folder).rglob("*"):
            is_data = folder == "redrafter_mlx" and path.suffix in (
                ".jsonl",
                ".safetensors",
                ".json",
            )
            if path.is_file() and (path.suffix == ".py" or is_data):
                expected.add(f"redrafter_mlx/{inside}{path.relative_to(ROOT / folder).as_posix()}")
    assert expected <= set(names), sorted(expected - set(names))

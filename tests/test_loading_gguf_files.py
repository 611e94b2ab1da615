"""Which file is a GGUF: known by its first bytes, or the one in a folder; parts of a split one find each other."""

from __future__ import annotations

from pathlib import Path

import pytest

import redrafter_mlx  # noqa: F401  (before mlx)

# isort: split
from redrafter_mlx.loading.gguf.files import find_gguf, part_paths


def file(path: Path, content: bytes = b"GGUF") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", ["m.gguf", "M.GGUF", "sha256-0123abcd", "model.bin"])
def test_a_file_that_begins_as_one(tmp_path: Path, name: str) -> None:
    path = file(tmp_path / name)
    assert find_gguf(path) == path


def test_other_files_are_none(tmp_path: Path) -> None:
    assert find_gguf(file(tmp_path / "m.safetensors", b"GGU")) is None
    assert find_gguf(tmp_path / "missing") is None
    assert find_gguf(file(tmp_path / "empty.gguf", b"")) is not None, (
        "its name says so: the reader refuses it"
    )


def test_a_folder_of_one(tmp_path: Path) -> None:
    path = file(tmp_path / "tiny.gguf")
    file(tmp_path / "config.json", b"{}")
    file(tmp_path / "mmproj-tiny.gguf")
    assert find_gguf(tmp_path) == path
    file(tmp_path / "other.gguf")
    with pytest.raises(ValueError, match=r"holds 2 GGUF files: name one of other.gguf, tiny.gguf"):
        find_gguf(tmp_path)
    file(tmp_path / "model.safetensors", b"")
    assert find_gguf(tmp_path) is None, "a folder of mlx-lm"


def test_a_folder_of_parts(tmp_path: Path) -> None:
    parts = [file(tmp_path / f"big-{number:05d}-of-00003.gguf") for number in (1, 2, 3)]
    assert find_gguf(tmp_path) == parts[0]
    for number, part in enumerate(parts):
        assert part_paths(part, number, 3) == parts


def test_parts_that_are_missing(tmp_path: Path) -> None:
    part = file(tmp_path / "big-00002-of-00003.gguf")
    assert find_gguf(tmp_path) == part, "the reader then says which one is missing"
    with pytest.raises(FileNotFoundError, match=r"part 2 of 3 .* big-00001-of-00003.gguf is not beside it"):
        part_paths(part, 1, 3)


def test_a_part_by_another_name(tmp_path: Path) -> None:
    for name, number in (("first.gguf", 0), ("big-00002-of-00003.gguf", 0)):
        with pytest.raises(ValueError, match=rf"part 1 of 3 .*--merge {name} merged.gguf"):
            part_paths(file(tmp_path / name), number, 3)

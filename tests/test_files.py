"""Files: damaged safetensors are one clear error before MLX maps them; JSON; Git LFS pointers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import redrafter_mlx  # noqa: F401  (before mlx)

# isort: split
import mlx.core as mx

from redrafter_mlx.files import (
    check_finite,
    check_safetensors,
    read_json,
    read_safetensors,
    write_safetensors,
)


def save(path: Path, header: object, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(begin: int, end: int, **changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [(end - begin) // 4], "data_offsets": [begin, end], **changes}


def test_a_whole_file_is_read(tmp_path: Path) -> None:
    arrays = {"a": mx.arange(6).reshape(2, 3), "b": mx.ones((4,), dtype=mx.bfloat16)}
    write_safetensors(tmp_path / "x.safetensors", arrays, {"format": "mlx"})
    assert check_safetensors(tmp_path / "x.safetensors") == 2
    read = read_safetensors(tmp_path / "x.safetensors")
    assert all(mx.array_equal(read[name], array) for name, array in arrays.items())


@pytest.mark.parametrize(
    ("header", "size", "rule"),
    [
        (b"{", 0, "not a safetensors file"),
        (b"[]", 0, "not a safetensors file"),
        (b"[" * 50_000, 0, "not a safetensors file"),
        ({"a": entry(0, 8)}, 7, "cut short"),
        ({"a": entry(0, 8)}, 9, "damaged"),
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "bytes of b begin at 4"),
        ({"a": entry(0, 8), "b": entry(0, 8)}, 8, "bytes of b begin at 0"),
        ({"a": entry(1, 9)}, 9, "bytes of a begin at 1"),
        ({"a": entry(0, 8, dtype="F64")}, 8, "a has dtype 'F64'"),
        ({"a": entry(0, 8, dtype=None)}, 8, "a has dtype 'None'"),
        ({"a": entry(0, 8, dtype={"x": 1})}, 8, "a has dtype \"{'x': 1}\""),
        ({"__metadata__": 1, "a": entry(0, 8)}, 8, "__metadata__ must be an object of text"),
        ({"__metadata__": {"format": 1}, "a": entry(0, 8)}, 8, "__metadata__ must be an object of text"),
        ({"a": entry(0, 8, shape=[3])}, 8, "cannot lie in bytes"),
        ({"a": entry(0, 8, shape=["2"])}, 8, "whole numbers"),
        ({"a": entry(0, 8, shape=[2**40, 2**40])}, 8, "cannot lie in bytes"),
        ({"a": entry(0, 8, shape=[-2])}, 8, "whole numbers"),
        ({"a": entry(0, 8, data_offsets=[0])}, 8, "cannot lie in bytes"),
        ({"a": entry(0, 8, data_offsets=None)}, 8, "whole numbers"),
        ({"a\nb": entry(0, 8)}, 8, r"a tensor is called 'a\\nb'"),
        ({"a": 3}, 8, "a has dtype 'None'"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, header: object, size: int, rule: str) -> None:
    path = save(tmp_path / "x.safetensors", header, bytes(size))
    with pytest.raises(ValueError, match=rule) as error:
        read_safetensors(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("cut", [0, 3, 8, 20])
def test_a_file_cut_anywhere(tmp_path: Path, cut: int) -> None:
    whole = save(tmp_path / "x.safetensors", {"a": entry(0, 8)}, bytes(8)).read_bytes()
    (tmp_path / "x.safetensors").write_bytes(whole[:cut])
    with pytest.raises(ValueError, match="not a safetensors file"):
        read_safetensors(tmp_path / "x.safetensors")


def test_a_git_lfs_pointer_is_called_one(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    for read in (read_safetensors, read_json):
        with pytest.raises(ValueError, match="Git LFS pointer"):
            read(path)


def test_json_with_a_byte_order_mark_and_json_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(path) == {"a": 1}
    for text in (b"[1]", b"{", b"\xff", b"[" * 100_000):
        path.write_bytes(text)
        with pytest.raises(ValueError, match=r"x\.json"):
            read_json(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_named(value: float) -> None:
    arrays = {"a": mx.ones((3,)), "ids": mx.arange(3), "b": mx.array([1.0, value], dtype=mx.bfloat16)}
    with pytest.raises(ValueError, match=r"here: b holds values that are not finite"):
        check_finite(arrays, "here")
    check_finite({name: arrays[name] for name in ("a", "ids")}, "here")

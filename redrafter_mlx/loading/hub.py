"""A folder on this machine, or one of the Hugging Face hub: the one look-up for loading and converting."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

PATTERNS = ("*.json", "*.safetensors", "tokenizer.model", "*.txt", "*.jinja", "*.tiktoken")
"""Files of a repository that are fetched. No Python: a model's code is mlx-lm's."""


def locate(
    source: str,
    what: str,
    *,
    revision: str | None = None,
    patterns: Sequence[str] = PATTERNS,
    otherwise: str = "give a folder, or owner/name on Hugging Face",
) -> Path:
    """A local path as it is, a Hugging Face id as its downloaded snapshot.

    Args:
        what: what is looked for, for messages.
        otherwise: what could be given instead, for messages.

    Raises:
        FileNotFoundError: there is neither; with the hub's reason.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise FileNotFoundError(f"no {what} at {source!r}: {otherwise}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=list(patterns)))
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"no {what} folder {source!r} here, and none from Hugging Face: {reason}"
        ) from None

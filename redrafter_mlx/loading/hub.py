"""A path on this machine, or a repository of the Hugging Face hub: the one look-up for loading and converting."""

from __future__ import annotations

import re
from pathlib import Path

PATTERNS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
"""Files of a repository that are fetched beside its weights. No Python: a model's code is mlx-lm's."""

SAFETENSORS, TORCH = ("*.safetensors",), ("*.bin", "*.pt")


def locate(
    source: str, what: str, accepts: str, *, revision: str | None = None, torch_too: bool = False
) -> Path:
    """A path on this machine as it is, `owner/name` as the folder downloaded from the hub.

    Args:
        what: what is looked for, for messages.
        accepts: what it could be on this machine, for messages.
        torch_too: fetch PyTorch's weights where the repository has no safetensors.

    Raises:
        FileNotFoundError: neither is there; with the hub's reason.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source):
        raise FileNotFoundError(f"no {what} at {source!r}: give {accepts}, or owner/name on Hugging Face")
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    weights: tuple[str, ...] = SAFETENSORS
    try:
        if torch_too:
            files = HfApi().list_repo_files(source, revision=revision)
            weights = weights if any(name.endswith(".safetensors") for name in files) else TORCH
        patterns = [*PATTERNS, *weights]
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise FileNotFoundError(f"no {what} {source!r} here, and none from Hugging Face: {reason}") from None

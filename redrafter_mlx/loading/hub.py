"""A path on this machine, or a repository of the Hugging Face hub: the one look-up for loading and converting."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

PATTERNS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
"""Files of a repository that are fetched beside its weights. No Python: a model's code is mlx-lm's."""

SAFETENSORS, TORCH = ("*.safetensors",), ("*.bin", "*.pt", "*.pth")
SECONDS = 10.0
"""How long the hub may take to say what a repository holds."""

_CLIENTS = ("httpx", "httpcore", "requests", "urllib3")
"""Modules of the HTTP clients that huggingface_hub has used, by how their names begin."""

_log = logging.getLogger("redrafter_mlx")


def locate(
    source: str, what: str, accepts: str, *, revision: str | None = None, torch_too: bool = False
) -> Path:
    """A path on this machine as it is, `owner/name` as the folder downloaded from the hub.

    A copy in the hub's cache is used, with a warning, where the hub does not answer.

    Args:
        what: what is looked for, for messages.
        accepts: what it could be on this machine, for messages.
        torch_too: fetch PyTorch's weights where the repository has no safetensors.

    Raises:
        FileNotFoundError: neither is there; with the hub's reason and what can be done.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source):
        raise FileNotFoundError(f"no {what} at {source!r}: give {accepts}, or owner/name on Hugging Face")
    try:
        return _fetch(source, revision, torch_too)
    except (
        Exception
    ) as error:  # the hub's HTTP client has errors of its own, which differ between its versions
        if not _is_expected(error):
            raise
        reason = _reason(source, revision, error)
        raise FileNotFoundError(f"no {what} {source!r} here, and none from Hugging Face: {reason}") from None


def _fetch(source: str, revision: str | None, torch_too: bool) -> Path:
    """The repository's folder in the hub's cache, complete.

    Raises:
        Exception: of huggingface_hub and of its HTTP client.
        ValueError: the repository holds no weights of a kind that is read.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        # asked once and with a limit: other calls try again for half a minute where there is no network
        siblings = HfApi().model_info(source, revision=revision, timeout=SECONDS).siblings or []
    except Exception as error:
        if not _is_expected(error):
            raise
        try:
            folder = snapshot_download(source, revision=revision, local_files_only=True)
        except Exception:
            raise error from None
        if not isinstance(error, OfflineModeIsEnabled):
            _log.warning("%s; using the copy of an earlier download", _reason(source, revision, error))
        return Path(folder)
    weights = _weights([file.rfilename for file in siblings], torch_too)
    return Path(snapshot_download(source, revision=revision, allow_patterns=[*PATTERNS, *weights]))


def _weights(names: Sequence[str], torch_too: bool) -> tuple[str, ...]:
    """Patterns of the weights to fetch out of a repository's files.

    Raises:
        ValueError: there are none.
    """
    if any(name.endswith(".safetensors") for name in names):
        return SAFETENSORS
    torch = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth")))
    if torch and torch_too:
        return TORCH
    if torch:
        raise ValueError(f"it holds PyTorch weights ({torch[0]}), which `redrafter-convert target` reads")
    if gguf := sorted(name for name in names if name.lower().endswith(".gguf")):
        raise ValueError(
            f"it holds GGUF files ({', '.join(gguf[:8])}{', ...' if len(gguf) > 8 else ''}): download one and give "
            "its path"
        )
    raise ValueError("it holds no weights (*.safetensors)")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__


def _is_expected(error: BaseException) -> bool:
    """True for what a network, the hub or a disk can do; False for a mistake in a program."""
    if isinstance(error, (OSError, ValueError)):
        return True
    modules = (each.__module__.split(".")[0] for each in type(error).__mro__)
    return any(module.startswith((*_CLIENTS, "huggingface_hub", "hf_xet")) for module in modules)


def _reason(source: str, revision: str | None, error: BaseException) -> str:
    """What the hub says, or why it cannot be asked, and what can be done."""
    from huggingface_hub import constants, errors

    found = list(_chain(error))
    page = f"{constants.ENDPOINT}/{source}"
    log_in = "log in with `hf auth login`, or set HF_TOKEN to a token of yours"
    if any(isinstance(each, errors.OfflineModeIsEnabled) for each in found):
        return "HF_HUB_OFFLINE is set, and its cache holds no copy of it"
    refusal = next((each for each in found if isinstance(each, errors.HfHubHTTPError)), None)
    if refusal is None:
        words = _first_line(error)
        if isinstance(error, ValueError):
            return words
        return (
            f"{constants.ENDPOINT} cannot be reached ({words}). Is there a network, or a folder of this name?"
        )
    response = getattr(refusal, "response", None)
    status = getattr(response, "status_code", None)
    said = getattr(refusal, "server_message", None) or _first_line(refusal)
    if isinstance(refusal, errors.GatedRepoError) or status == 403:
        return f"{said} Accept its license on {page}, then {log_in}"
    if isinstance(refusal, errors.RevisionNotFoundError):
        return f"there is no revision {revision!r} of it ({said})"
    if status == 401:
        return f"{said} (401). It is private, or there is no such repository: check the name, and {log_in}"
    if isinstance(refusal, errors.RepositoryNotFoundError) or status == 404:
        return f"there is no such repository ({said}). Check the name; if it is private, {log_in}"
    if status == 429:
        return f"too many requests ({said}). Wait a few minutes, or {log_in}"
    return f"{said} ({status})" if status else said


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

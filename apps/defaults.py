"""The sampling that a model's authors chose for it: its `generation_config.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PLAIN = {"temperature": 0.2, "top_p": 0.9}
"""Where the authors say nothing: warm enough for variety, and cool enough for models of 135 million parameters."""


def chat_sampling(model: str, given: dict[str, float | int | None]) -> dict[str, Any]:
    """Values of `Sampling` for a conversation: those given, else the model's own, else `PLAIN`.

    Args:
        model: as `--model` has it; it has been loaded, so that its files are on this machine.
        given: of the command line, None where an option was not given.

    Raises:
        ValueError: the model's own are no numbers.
    """
    chosen = {name: value for name, value in given.items() if value is not None}
    own = _own(_generation_config(model))
    return {**(own or PLAIN), **chosen}


def _generation_config(model: str) -> dict[str, Any]:
    from redrafter_mlx.files import read_json

    path: Path | str | None = Path(model).expanduser() / "generation_config.json"
    if not Path(model).expanduser().exists() and model.count("/") == 1:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(model, "generation_config.json")
        path = found if isinstance(found, str) else None
    return read_json(Path(path)) if path is not None and Path(path).is_file() else {}


def _own(config: dict[str, Any]) -> dict[str, Any]:
    """What of it `Sampling` knows; greedy where the authors do not sample."""
    if config.get("do_sample") is False:
        return {"temperature": 0.0}
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    own = {name: config[name] for name in names if config.get(name) is not None}
    for name, value in own.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"generation_config.json: {name} must be a number, not {value!r}")
    if config.get("do_sample") is True:
        return {"temperature": 1.0, **own}  # what transformers takes where it is not said
    return own

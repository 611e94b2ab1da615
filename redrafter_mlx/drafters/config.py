"""Reading the `config.json` of a drafter: each value must have the type of its field; unknown keys are reported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Any, TypeVar, cast

from .interface import TargetView

C = TypeVar("C")

BOILERPLATE = frozenset({
    "architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "_name_or_path",
    "num_lookback_tokens", "emb_norm", "rms_norm_eps",
})  # fmt: skip
"""Keys that Hugging Face or Apple write into every config and that say nothing about a drafter."""

LARGEST = 1 << 24
"""Upper bound of every size in a config, so that a damaged one cannot ask for more memory than there is."""


def read_config(kind: type[C], values: dict[str, Any], where: str) -> tuple[C, list[str]]:
    """A config dataclass from JSON values; returns it with the unknown keys, which the caller should report.

    Raises:
        ValueError: a key is missing, or has a value it cannot have; `where` is named.
    """
    known = {each.name: each for each in fields(kind)}  # type: ignore[arg-type]
    missing = [
        name
        for name, each in known.items()
        if each.default is MISSING and each.default_factory is MISSING and name not in values
    ]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    kept = {name: value for name, value in values.items() if name in known}
    for name, value in kept.items():
        try:
            kept[name] = _as_type(value, str(known[name].type))
        except ValueError as error:
            raise ValueError(f"{where}: {name} must be {error}, not {shown(value)}") from None
    try:
        config = kind(**kept)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return config, sorted(set(values) - set(known) - BOILERPLATE)


def _as_type(value: Any, annotation: str) -> Any:
    """`value` converted to the type of its field's annotation; the ValueError says what it must be."""
    kinds = [part.strip() for part in annotation.split("|")]
    if value is None:
        if "None" in kinds:
            return None
        raise ValueError(_NAMES[kinds[0]])
    kind = kinds[0]
    if kind == "int":
        ok = isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST
    elif kind == "float":
        ok = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= 1e300
    elif kind in ("bool", "str"):
        ok = isinstance(value, {"bool": bool, "str": str}[kind])
    elif kind.startswith("tuple"):
        item = kind.removeprefix("tuple[").split(",")[0]
        ok = isinstance(value, (list, tuple))
        try:
            value = tuple(_as_type(each, item) for each in value) if ok else value
        except ValueError:
            ok = False
    else:
        ok = isinstance(value, dict)
    if not ok:
        raise ValueError(_NAMES[kind])
    return value


_NAMES = {
    "int": f"an integer of at most {LARGEST}",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "tuple[int, ...]": "a list of integers",
    "tuple[float, ...]": "a list of numbers",
    "dict[str, Any]": "an object",
    "dict[str, int]": "an object",
}


def shown(value: Any) -> str:
    """A value for an error message, shortened if it is long."""
    text = repr(value) if not isinstance(value, int) or abs(value) < 1e30 else "a number of many digits"
    return text if len(text) <= 60 else text[:57] + "..."


def check_fit(config: Any, target: TargetView) -> None:
    """Check that a drafter's sizes are those of the target.

    Raises:
        ValueError: it was made for another target.
    """
    for name in ("hidden_size", "vocab_size"):
        mine, theirs = getattr(config, name), getattr(target, name)
        if mine != theirs:
            made_for = config.target.get("name", "another model")
            raise ValueError(
                f"this drafter does not fit the target: {name} is {mine} (made for {made_for}), "
                f"the target has {theirs}"
            )


def check_positive(config: object, names: Sequence[str]) -> None:
    """Check that these fields are integers above 0.

    Raises:
        ValueError: one is not.
    """
    for name in names:
        value = cast(int, getattr(config, name))
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST:
            raise ValueError(f"{name} must be a positive integer, at most {LARGEST}, not {shown(value)}")

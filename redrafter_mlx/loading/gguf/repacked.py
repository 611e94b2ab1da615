"""Tensors packed anew are kept in the cache folder, so that a file costs that once."""

from __future__ import annotations

import logging
from pathlib import Path

import mlx.core as mx

from redrafter_mlx.files import cache_dir, check_safetensors, new_file, write_safetensors

from .reader import GGUFHeader
from .tensors import FLOATS, NATIVE, Packed, PackingError, repack

VERSION = "1"
"""Of what `repack` makes of a tensor; another one is made anew."""

_log = logging.getLogger("redrafter_mlx")


def foreign(header: GGUFHeader) -> dict[str, str]:
    """The tensors that MLX has no type for: name -> type."""
    return {
        name: kind for name, (_, kind) in header.tensors.items() if kind not in FLOATS and kind not in NATIVE
    }


def is_packed(header: GGUFHeader) -> bool:
    """True where nothing has to be packed anew, or that was done and is kept."""
    return not foreign(header) or _place(header).is_file()


def _place(header: GGUFHeader) -> Path:
    return cache_dir() / "gguf" / f"{header.digest[:32]}-{VERSION}.safetensors"


def repacked(header: GGUFHeader, path: Path) -> dict[str, Packed]:
    """The tensors that MLX has no type for, by name: from the cache, or made and put there, which is logged.

    Raises:
        ValueError: the `gguf` package cannot read a tensor's type.
    """
    wanted = foreign(header)
    if not wanted:
        return {}
    kept = _place(header)
    found = _read(kept, header, wanted)
    if found is not None:
        return found
    kinds = ", ".join(sorted(set(wanted.values())))
    _log.warning("packing the %s tensors of %s for MLX, once", kinds, path.name)
    error, made = PackingError(), {}
    for name, kind in wanted.items():
        try:
            made[name] = repack(header.places[name], header.tensors[name][0], kind, error)
        except (NotImplementedError, AttributeError, ValueError) as reason:
            raise ValueError(
                f"{path}: {name} has type {kind}, which the gguf package cannot read: {reason}"
            ) from None
    _log.warning("%s packed: %s", kinds, error)
    return _write(kept, made, error, header, wanted)


def _read(kept: Path, header: GGUFHeader, wanted: dict[str, str]) -> dict[str, Packed] | None:
    """What is in the cache; None where it is not all there, or damaged."""
    if not kept.is_file():
        return None
    try:
        check_safetensors(kept)
        arrays = mx.load(str(kept), format="safetensors")
        assert isinstance(arrays, dict)
        return {name: _packed(arrays, name, header.tensors[name][0]) for name in wanted}
    except (ValueError, KeyError, RuntimeError):
        _log.warning("%s is damaged, making it again", kept)
        return None


def _packed(arrays: dict[str, mx.array], name: str, shape: tuple[int, ...]) -> Packed:
    weight = arrays[f"{name}.weight"]
    bits, rest = divmod(weight.shape[-1] * 32, shape[-1])
    if rest or weight.shape[:-1] != shape[:-1]:
        raise ValueError(f"{name} does not have the shape {shape}")
    return Packed(weight, arrays[f"{name}.scales"], arrays[f"{name}.biases"], bits)


def _write(
    kept: Path, made: dict[str, Packed], error: PackingError, header: GGUFHeader, wanted: dict[str, str]
) -> dict[str, Packed]:
    """Put them into the cache and take them from there, so that they are mapped and not held twice."""
    arrays = {
        f"{name}.{part}": array for name, packed in made.items() for part, array in packed.parts.items()
    }
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with new_file(kept) as part:
            write_safetensors(part, arrays, {"error": str(error)})
    except OSError as reason:
        _log.warning("%s cannot be kept, so it is packed again next time: %s", kept, reason)
        return made
    return _read(kept, header, wanted) or made

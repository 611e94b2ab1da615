"""Where weights come from: a folder, a file, or a Hugging Face id; safetensors or PyTorch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from redrafter_mlx.files import DTYPES, check_writable, new_folder, read_json, read_safetensors
from redrafter_mlx.loading import hub

from .torch_file import read_torch
from .torch_tensor import TorchTensor

Tensor = mx.array | TorchTensor
SAFETENSORS = ("model.safetensors.index.json", "model.safetensors", "rank0.safetensors")
TORCH = ("pytorch_model.bin.index.json", "pytorch_model.bin", "model.pt", "model.bin", "model.pth")
_TORCH_ENDINGS = (".pt", ".bin", ".pth", ".ckpt")
# What an earlier conversion may have left in a folder; --force takes these away.
_REPLACED = (
    "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json",
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template.*", "vocab.*",
    "merges.txt",
)  # fmt: skip
# What systems put into the root of a disk, which is empty all the same.
_OF_THE_DISK = frozenset({
    "lost+found", ".DS_Store", ".Trashes", ".Spotlight-V100", ".fseventsd", ".TemporaryItems",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Weights:
    """Named tensors, not read yet."""

    tensors: dict[str, Tensor]
    files: tuple[Path, ...]

    @property
    def folder(self) -> Path:
        return self.files[0].parent

    @property
    def container(self) -> str:
        """In words, for `info`."""
        kind = "safetensors" if self.files[0].suffix == ".safetensors" else "PyTorch, weights only"
        names = ", ".join(file.name for file in self.files[:4])
        return f"{kind}: {names}{f' and {len(self.files) - 4} more' if len(self.files) > 4 else ''}"


def as_array(tensor: Tensor) -> mx.array:
    """Read a tensor that has not been read yet."""
    return tensor.array() if isinstance(tensor, TorchTensor) else tensor


def dtype_name(dtype: mx.Dtype) -> str:
    """As configs write it: mlx.core.float32 -> float32."""
    return str(dtype).rpartition(".")[2]


def dtype_of(name: str | None) -> mx.Dtype | None:
    """The dtype a `--dtype` names."""
    return None if name is None else DTYPES[name]


def locate(source: str, what: str) -> Path:
    """A path on this machine as it is, `owner/name` as the folder downloaded from Hugging Face.

    Raises:
        FileNotFoundError: neither is there.
    """
    return hub.locate(source, what, "a folder, a file", torch_too=True)


def read_weights(path: Path) -> Weights:
    """Names and tensors of a checkpoint: a folder of one, or the file itself.

    Raises:
        FileNotFoundError, ValueError: no weights there, more than one set, or a damaged file.
    """
    file = main_file(path) if path.is_dir() else path
    if file.name.endswith(".index.json"):
        return _read_shards(file)
    if re.fullmatch(r"rank\d+\.safetensors", file.name):
        return _read_ranks(file.parent)
    return Weights(_read_file(file), (file,))


def main_file(folder: Path) -> Path:
    """The index, or the one file, of a folder's weights.

    Raises:
        FileNotFoundError, ValueError: there is none, or it cannot be told which.
    """
    for name in (*SAFETENSORS, *TORCH):
        if (folder / name).is_file():
            return folder / name
    for endings in ((".safetensors",), _TORCH_ENDINGS):
        found = sorted(f for f in folder.iterdir() if f.suffix in endings and f.is_file())
        if len(found) > 1:
            raise ValueError(f"{folder} holds {len(found)} files of weights: name one of {_names(found)}")
        if found:
            return found[0]
    raise FileNotFoundError(f"no weights in {folder}: looked for {', '.join((*SAFETENSORS, *TORCH))}")


def shortened(names: Sequence[str], most: int = 6) -> str:
    """The first few names, for a message."""
    return ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")


def _names(files: list[Path]) -> str:
    return shortened([file.name for file in files])


def _read_file(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        return dict(read_safetensors(file))
    return dict(read_torch(file))


def shard_files(index: Path) -> tuple[dict[str, str], list[Path]]:
    """An index's map from tensor to file name, and the files, all of them there.

    Raises:
        FileNotFoundError, ValueError: a shard is missing, or the index is not one.
    """
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise ValueError(f"{index} has no weight_map")
    shards = sorted({str(name) for name in where.values()})
    if outside := [name for name in shards if Path(name).name != name]:
        raise ValueError(f"{index} points outside its folder: {outside[0]}")
    files = [index.parent / name for name in shards]
    if missing := [file for file in files if not file.is_file()]:
        raise FileNotFoundError(f"{index} names shards that are missing: {_names(missing)}")
    return where, files


def _read_shards(index: Path) -> Weights:
    where, files = shard_files(index)
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= _read_file(file)
    if absent := sorted(where.keys() - tensors.keys()):
        raise ValueError(f"{index} names tensors that its shards lack: {shortened(absent)}")
    return Weights({name: tensors[name] for name in where}, tuple(files))


def _read_ranks(folder: Path) -> Weights:
    """TensorRT-LLM's tensor parallelism: every drafter tensor is split by rows over the ranks."""
    files = sorted(folder.glob("rank*.safetensors"), key=lambda f: int(re.sub(r"\D", "", f.stem) or -1))
    if [f.name for f in files] != [f"rank{i}.safetensors" for i in range(len(files))]:
        raise ValueError(f"{folder} lacks ranks: it holds {_names(files)}")
    ranks = [read_safetensors(file) for file in files]
    if any(rank.keys() != ranks[0].keys() for rank in ranks):
        raise ValueError(f"{folder}: the ranks hold different tensors")
    names = [name for name in ranks[0] if name.startswith("drafter.")]
    return Weights({name: mx.concatenate([rank[name] for rank in ranks]) for name in names}, tuple(files))


@contextmanager
def output_folder(out: Path, force: bool) -> Iterator[Path]:
    """A folder to write into that becomes `out` when the block ends without an error.

    With `force` a model's files left in `out` by an earlier conversion go; other files there stay.

    Raises:
        ValueError: `out` is a file, is not empty (without `force`), or cannot be written.
    """
    check_output(out, force)
    try:
        with new_folder(out, replaced=_REPLACED) as part:
            yield part
    except RuntimeError as error:  # what mx.save_safetensors raises on a full disk
        raise ValueError(f"--out {out} cannot be written: {error}") from None


def check_output(out: Path, force: bool) -> None:
    """Refuse before any work what `output_folder` would refuse after it."""
    try:
        is_there = out.exists()
        files = [file.name for file in out.iterdir()] if out.is_dir() else []
    except (OSError, ValueError) as error:
        raise ValueError(f"--out {str(out)!r} cannot be read: {error}") from None
    if is_there and not out.is_dir():
        raise ValueError(f"--out must be a folder, and {out} is a file")
    if not force and any(name not in _OF_THE_DISK for name in files):
        raise ValueError(f"--out {out} is not empty: name a new folder, or add --force to replace its model")
    # what is asked about a file in it holds for the folder: its parents are there or can be made
    check_writable(out / "config.json", "--out")


Report = Callable[[str], None]
"""Takes a line for the user, about something worth knowing."""

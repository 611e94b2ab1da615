"""PyTorch files (.pt, .bin, .pth) as weights only, without PyTorch and without running anything in them.

What a file holds is a pickle (`torch_pickle`) that names storages by key, and the storages' raw bytes. There are two
formats: a zip archive `NAME/data.pkl`, `NAME/data/KEY` (1.6 and later) and, before, five pickles followed by the raw
storages.
"""

from __future__ import annotations

import io
import mmap
import struct
import zipfile
from pathlib import Path
from typing import Any

from redrafter_mlx.files import check_real

from .torch_pickle import Machine, UnsafeFile
from .torch_tensor import Storage, TorchTensor, described_storage

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_SHARING = 16  # times that a file's bytes may be read as tensors that share them; tied weights make it 2

# What zipfile, pickletools and the machine raise on bytes that make no sense.
_DAMAGE = (
    ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, EOFError, OSError,
    MemoryError, RuntimeError, struct.error, zipfile.BadZipFile,
)  # fmt: skip


class _Zip:
    """The archive of PyTorch 1.6 and later. Keeps the last storage read: tensors may share one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with zipfile.ZipFile(path) as archive:
            pickles = [n for n in archive.namelist() if n.endswith("/data.pkl") and n.count("/") == 1]
            if len(pickles) != 1:
                raise ValueError("it is a zip archive without NAME/data.pkl")
            self.root = pickles[0].removesuffix("/data.pkl")
            self.sizes = {info.filename: info.file_size for info in archive.infolist()}
            self.pickle = self.entry(archive, pickles[0])
            order = f"{self.root}/byteorder"
            if order in self.sizes and self.entry(archive, order) != b"little":
                raise ValueError("it was written on a big-endian machine")
        self.last: tuple[str, bytes] = ("", b"")

    def parse(self) -> Any:
        """What was saved, its tensors not read yet."""
        return Machine(self.load, len(self.pickle)).run(io.BytesIO(self.pickle))

    @staticmethod
    def entry(archive: zipfile.ZipFile, name: str) -> bytes:
        """The bytes of one entry."""
        info = archive.getinfo(name)
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"its entry {name} is compressed, which torch.save never does")
        if info.CRC == 0:  # written without checksums
            info.CRC = None  # type: ignore[assignment]
        with archive.open(info) as file:
            return file.read()

    def load(self, key: tuple[Any, ...]) -> Storage:
        """A storage, its size compared with the archive's."""
        storage = described_storage(key, self.read)
        if self.sizes.get(f"{self.root}/data/{storage.key}") != storage.size * storage.width:
            raise ValueError(
                f"its storage {storage.key[:60]} is missing or has another size than the pickle says"
            )
        return storage

    def read(self, key: str) -> bytes:
        """The bytes of a storage."""
        if self.last[0] != key:
            name = f"{self.root}/data/{key}"
            try:
                with zipfile.ZipFile(self.path) as archive:
                    self.last = (key, self.entry(archive, name))
            except _DAMAGE as error:
                raise ValueError(f"{self.path} is damaged: {_short(error)}") from None
            if len(self.last[1]) != self.sizes[name]:
                raise ValueError(f"{self.path} is damaged: its storage {key[:60]} is cut short")
        return self.last[1]


class _Legacy:
    """The format before PyTorch 1.6: magic number, protocol, platform, object, keys, storages."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.storages: dict[str, Storage] = {}
        self.places: dict[str, tuple[int, int]] = {}

    def load(self, key: tuple[Any, ...]) -> Storage:
        """A storage whose bytes follow later in the file."""
        storage = described_storage(key, self.read)
        first = self.storages.setdefault(storage.key, storage)
        if first.kind != storage.kind:
            raise ValueError(f"its storage {storage.key[:60]} is of two dtypes")
        return storage

    def parse(self) -> Any:
        """What was saved, its tensors not read yet."""
        with (
            self.path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            size = len(data)
            for expected in (_LEGACY_MAGIC, _LEGACY_PROTOCOL):
                if Machine(self.load, size).run(data) != expected:
                    raise ValueError("it does not begin as a PyTorch file")
            platform = Machine(self.load, size).run(data)
            if not isinstance(platform, dict) or platform.get("little_endian") is not True:
                raise ValueError("it was written on a big-endian machine")
            value = Machine(self.load, size).run(data)
            keys = Machine(self.load, size).run(data)
            if not isinstance(keys, list) or not all(type(key) is str for key in keys):
                raise ValueError("the keys of its storages must be text")
            for key in keys:
                (count,) = struct.unpack("<q", data.read(8))
                begin, length = data.tell(), count * self.storages[key].width
                if count < 0 or begin + length > size:
                    raise ValueError("it is cut short")
                self.places[key] = (begin, length)
                data.seek(begin + length)
        for key, storage in self.storages.items():
            if key not in self.places:
                raise ValueError("storages are missing")
            if (storage.start + storage.size) * storage.width > self.places[key][1]:
                raise ValueError(f"its storage {key[:60]} has another size than the pickle says")
        return value

    def read(self, key: str) -> bytes:
        """The bytes of a storage."""
        start, size = self.places[key]
        with self.path.open("rb") as file:
            file.seek(start)
            data = file.read(size)
        if len(data) != size:
            raise ValueError(f"{self.path} is damaged: its storage {key[:60]} is cut short")
        return data


def _short(error: BaseException) -> str:
    """What an error says, on one line and without the file's own lengthy values."""
    said = "an offset in it leads nowhere" if isinstance(error, OSError) else str(error)
    text = " ".join(said.split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def _tensors(item: Any) -> dict[str, TorchTensor]:
    pairs = item.items() if isinstance(item, dict) else ()
    return {k: v for k, v in pairs if isinstance(k, str) and isinstance(v, TorchTensor)}


def _state_dict(value: Any) -> dict[str, TorchTensor]:
    """The one dictionary of tensors in what was saved: itself, or a value such as "state_dict"."""
    if found := _tensors(value):
        return found
    inner = list(value.values()) if isinstance(value, dict) else []
    apart = {id(item): item for item in inner}  # one dictionary under many names is looked at once
    candidates = [found for item in apart.values() if (found := _tensors(item))]
    if len(candidates) != 1:
        raise ValueError(f"it holds {len(candidates)} dictionaries of tensors, where one is expected")
    return candidates[0]


def read_torch(path: Path) -> dict[str, TorchTensor]:
    """Names and tensors of a PyTorch file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a PyTorch file, damaged, or asking for more than weights; the path is named.
    """
    check_real(path)
    try:
        reader: _Zip | _Legacy
        if zipfile.is_zipfile(path):
            reader = _Zip(path)
        else:
            with path.open("rb") as file:
                if file.read(2) == b"PK":
                    raise ValueError("the zip archive is cut short")
            reader = _Legacy(path)
        tensors = _state_dict(reader.parse())
        needed = sum(tensor.size * tensor.storage.width for tensor in tensors.values())
        if needed > _SHARING * path.stat().st_size:
            raise ValueError(f"its tensors share their bytes more than {_SHARING} times")
    except UnsafeFile as error:
        raise UnsafeFile(f"{path} {_short(error)}") from None
    except _DAMAGE as error:
        raise ValueError(f"{path} is not a PyTorch file of weights, or is damaged: {_short(error)}") from None
    return tensors

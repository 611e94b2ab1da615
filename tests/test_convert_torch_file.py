"""PyTorch files: every dtype and layout torch writes, and nothing executed, whatever they ask."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from pathlib import Path

import pytest

import redrafter_mlx  # noqa: F401

# isort: split
import mlx.core as mx
import numpy as np

from convert.torch_file import read_torch
from convert.torch_pickle import UnsafeFile
from convert.torch_tensor import TorchTensor

GOLDENS = Path(__file__).parent / "goldens" / "torch_files"
KINDS = {
    "float32": "FloatStorage",
    "float64": "DoubleStorage",
    "float16": "HalfStorage",
    "int64": "LongStorage",
}


def text(value: str) -> bytes:
    """BINUNICODE."""
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def ints(*values: int) -> bytes:
    """A tuple of BININTs."""
    return b"(" + b"".join(b"J" + struct.pack("<i", v) for v in values) + b"t"


def tensor(
    key: str, size: int, shape: tuple[int, ...], *, offset: int = 0, kind: str = "FloatStorage"
) -> bytes:
    """The pickle of a contiguous tensor as torch.save writes it."""
    stride = [int(np.prod(shape[i + 1 :])) for i in range(len(shape))]
    storage = b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu")
    storage += b"J" + struct.pack("<i", size) + b"tQ"
    arguments = storage + b"J" + struct.pack("<i", offset) + ints(*shape) + ints(*stride) + b"\x89"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"ccollections\nOrderedDict\n)RtR"


def write_zip(path: Path, body: bytes, storages: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + body + b".")
        archive.writestr("archive/byteorder", "little")
        for key, data in storages.items():
            archive.writestr(f"archive/data/{key}", data)
    return path


def write_torch(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    """A state dict as `torch.save` would write it, without torch."""
    body, storages = b"}(", {}
    for number, (name, array) in enumerate(arrays.items()):
        kind = KINDS[str(array.dtype)]
        body += text(name) + tensor(str(number), array.size, array.shape, kind=kind)
        storages[str(number)] = np.ascontiguousarray(array).tobytes()
    return write_zip(path, body + b"u", storages)


def values(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32) if array.dtype == mx.bfloat16 else array)


@pytest.mark.parametrize("name", ["zip", "protocol5", "legacy"])
def test_reads_what_torch_wrote(name: str) -> None:
    expected = np.load(GOLDENS / "expected.npz")
    found = read_torch(GOLDENS / f"{name}.pt")
    assert set(found) == set(expected)
    for key, item in found.items():
        array = item.array()
        assert item.dtype == array.dtype
        assert item.shape == tuple(array.shape) == expected[key].shape
        np.testing.assert_array_equal(values(array), expected[key], err_msg=key)
    assert found["bf16"].dtype == mx.bfloat16 and found["f16"].dtype == mx.float16
    assert found["f64"].dtype == mx.float32 and found["i64"].dtype == mx.int64


@pytest.mark.parametrize("name", ["nested", "no_checksums"])
def test_other_shapes_of_file(name: str) -> None:
    found = read_torch(GOLDENS / f"{name}.pt")
    assert found["weight"].array().tolist() == [[0, 1], [2, 3], [4, 5]]


def test_the_writer_of_these_tests(tmp_path: Path) -> None:
    array = np.arange(6, dtype=np.float16).reshape(2, 3)
    found = read_torch(write_torch(tmp_path / "x.pt", {"a": array}))
    np.testing.assert_array_equal(values(found["a"].array()), array)


class Command:
    """Pickles as a call of os.system."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("container", ["zip", "bare"])
def test_code_is_refused_by_name(tmp_path: Path, protocol: int, container: str) -> None:
    marker, path = tmp_path / "executed", tmp_path / "model.pt"
    data = pickle.dumps({"w": Command(marker)}, protocol=protocol)
    if container == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", data)
    else:
        path.write_bytes(data)
    asks = r"model\.pt asks for (posix|nt)\.system" if protocol else "opcode DICT"
    with pytest.raises(UnsafeFile, match=asks):
        read_torch(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"cbuiltins\neval\n(" + text("1") + b"tR", "asks for builtins.eval"),
        (text("builtins") + text("exec") + b"\x93(" + text("1") + b"tR", "asks for builtins.exec"),
        (b"ctorch\nload\n(" + text("x") + b"tR", "asks for torch.load"),
        (b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n", "asks for torch._utils"),
        (b"ctorch\nFloatStorage\n)R", "calls something"),
        (b"ccollections\nOrderedDict\n)\x81", "opcode NEWOBJ"),
        (b"(ios\nsystem\n", "opcode INST"),
        (b"\x82\x01", "opcode EXT1"),
    ],
)
def test_other_ways_to_code_are_refused(tmp_path: Path, body: bytes, message: str) -> None:
    with pytest.raises(UnsafeFile, match=message):
        read_torch(write_zip(tmp_path / "x.pt", body, {}))


def test_a_pickled_module_is_refused() -> None:
    with pytest.raises(UnsafeFile, match=r"asks for torch\.nn\.modules\.linear\.Linear"):
        read_torch(GOLDENS / "module.pt")


def test_a_tensor_must_lie_in_its_storage(tmp_path: Path) -> None:
    data = {"0": np.zeros(6, np.float32).tobytes()}
    for item, message in (
        (tensor("0", 6, (3, 3)), "cannot lie in 6 values"),
        (tensor("0", 9, (3, 3)), "storage 0 is missing or has another size"),
        (tensor("1", 6, (2, 3)), "storage 1 is missing"),
        (tensor("0", 6, (2, -3)), "integers from 0"),
        (tensor("0", 6, (2, 3), offset=1), "cannot lie in 6 values"),
        (tensor("0", 6, (1,) * 40), "at most 32 integers"),
        (
            tensor("0", 6, (0, 2**31 - 1)).replace(b"J\xff\xff\xff\x7f", b"\x8a\x05\0\0\0\0\1"),
            "integers from 0",
        ),
        (tensor("0", 6, (2, 3), kind="ComplexFloatStorage"), "asks for torch.ComplexFloatStorage"),
    ):
        body = b"}" + text("w") + item + b"s"
        with pytest.raises(ValueError, match=message):
            read_torch(write_zip(tmp_path / "x.pt", body, data))
    empty = b"}" + text("w") + tensor("0", 6, (0, 7)) + b"s"
    assert read_torch(write_zip(tmp_path / "x.pt", empty, data))["w"].array().shape == (0, 7)


_SIZE = b"ctorch\nSize\nq\1"
_DEEP = b")q\0" + b"h\0h\0\x86q\0" * 60  # a tuple of twice a tuple, 60 deep: hashing it takes 2**60 steps


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (_DEEP + b"}h\0K\1s", "keys must be text or numbers"),
        (_DEEP + b"ccollections\nOrderedDict\n(](h\0K\1\x86etR", "keys must be text or numbers"),
        (b"}\x8a\x10" + bytes(15) + b"\x01K\1s", "keys must be text or numbers"),
        (b"}M\1\0" + b"\x8b\x40\0\0\0" + b"\1" * 64 + b"s", "an integer has 505 bits, more than 128"),
        (
            b"](" + b"N" * 10_000 + b"eq\0" + _SIZE + b"(" + b"h\1h\0\x85R" * 10_000 + b"t",
            "copies more values",
        ),
        (
            b"](" + b"N" * 10_000 + b"eq\0ccollections\nOrderedDict\nq\1(" + b"h\1h\0\x85R" * 10_000 + b"t",
            "copies more|pairs|unpack",
        ),
        (
            b"("
            + b"N" * 10_000
            + b"tq\0ctorch._utils\n_rebuild_parameter\nq\1("
            + b"h\1h\0R" * 10_000
            + b"t",
            "copies more values",
        ),
        (b"(" + b"N" * 10_000 + b"tq\0(" + b"h\0Q" * 10_000 + b"t", "described in an unknown way"),
    ],
)
def test_a_small_file_cannot_keep_the_reader_busy(tmp_path: Path, body: bytes, message: str) -> None:
    """Each would take minutes, gigabytes or for ever if it were carried out as written."""
    with pytest.raises(ValueError, match=message):
        read_torch(write_zip(tmp_path / "x.pt", body, {}))


def test_one_dictionary_under_many_names_is_looked_at_once(tmp_path: Path) -> None:
    inner = b"}(" + b"".join(text(f"{i}") + b"N" for i in range(5000)) + b"uq\0"
    outer = inner + b"}(" + b"".join(text(f"{i}") + b"h\0" for i in range(5000)) + b"u"
    with pytest.raises(ValueError, match="holds 0 dictionaries of tensors"):
        read_torch(write_zip(tmp_path / "x.pt", outer, {}))


def test_tied_tensors_share_their_bytes_and_no_file_grows_without_bound(tmp_path: Path) -> None:
    def shared(times: int) -> dict[str, TorchTensor]:
        one = tensor("0", 10_000, (10_000,)) + b"q\0"
        names = b"".join(text(f"w{i}") + b"h\0" for i in range(times))
        return read_torch(write_zip(tmp_path / "x.pt", one + b"}(" + names + b"u", data))

    data = {"0": np.ones(10_000, np.float32).tobytes()}
    found = shared(2)
    assert found["w0"].array().sum().item() == found["w1"].array().sum().item() == 10_000
    with pytest.raises(ValueError, match="share their bytes more than 16 times"):
        shared(40)


def test_a_git_lfs_pointer_is_called_one(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(ValueError, match="Git LFS pointer"):
        read_torch(tmp_path / "x.pt")


def test_no_dictionary_of_tensors(tmp_path: Path) -> None:
    both = b"}(" + text("a") + b"}" + text("w") + tensor("0", 1, (1,)) + b"s"
    both += text("b") + b"}" + text("w") + tensor("0", 1, (1,)) + b"su"
    with pytest.raises(ValueError, match="holds 2 dictionaries"):
        read_torch(write_zip(tmp_path / "x.pt", both, {"0": b"\0" * 4}))
    with pytest.raises(ValueError, match="holds 0 dictionaries"):
        read_torch(write_zip(tmp_path / "y.pt", b"]", {}))


def test_not_a_torch_file(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    for content in (
        b"",
        b"PK",
        b"hello, this is text",
        b"\x80\x02K\x01.",
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.pt is not a PyTorch file of weights, or is damaged"):
            read_torch(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("something.txt", "else")
    with pytest.raises(ValueError, match=r"without NAME/data\.pkl"):
        read_torch(path)
    with pytest.raises(FileNotFoundError, match="no file"):
        read_torch(tmp_path / "absent.pt")


@pytest.mark.parametrize("name", ["zip", "legacy"])
def test_every_truncation_is_an_error(tmp_path: Path, name: str) -> None:
    whole = (GOLDENS / f"{name}.pt").read_bytes()
    path = tmp_path / "x.pt"
    for size in range(0, len(whole), 41):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"x\.pt"):
            read_torch(path)


@pytest.mark.parametrize("name", ["zip", "legacy"])
def test_damage_is_never_another_kind_of_error(tmp_path: Path, name: str) -> None:
    """Random bytes overwritten: an error, or (where only values changed) tensors; never a crash."""
    rng = np.random.default_rng(0)
    whole = (GOLDENS / f"{name}.pt").read_bytes()
    path = tmp_path / "x.pt"
    refused = 0
    for _ in range(300):
        data = bytearray(whole)
        for place in rng.integers(0, len(data), 3):
            data[place] = rng.integers(0, 256)
        path.write_bytes(data)
        try:
            for item in read_torch(path).values():
                mx.eval(item.array())
        except ValueError:
            refused += 1
    assert refused > 30


def test_flipped_weight_is_found_by_the_checksum(tmp_path: Path) -> None:
    source = write_torch(tmp_path / "x.pt", {"a": np.ones(8, np.float32)}).read_bytes()
    place = source.index(np.ones(8, np.float32).tobytes())
    broken = io.BytesIO(source)
    broken.seek(place)
    broken.write(b"\1")
    (tmp_path / "x.pt").write_bytes(broken.getvalue())
    found = read_torch(tmp_path / "x.pt")
    with pytest.raises(ValueError, match="is damaged: Bad CRC-32"):
        found["a"].array()

"""Every ggml type: MLX's own stay bit for bit, the others are packed with an error that is bounded, and reported."""

from __future__ import annotations

from pathlib import Path

import pytest

import redrafter_mlx  # noqa: F401  (before mlx)

# isort: split
import gguf
import mlx.core as mx
import numpy as np

from redrafter_mlx.loading.gguf.reader import TENSOR_TYPES, Place
from redrafter_mlx.loading.gguf.tensors import (
    FLOATS,
    NATIVE,
    Packed,
    PackingError,
    read_float,
    read_packed,
    repack,
)

SHAPE = (3, 5, 512)
HALVES = {  # where float16 numbers stand in a block of random bytes
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ1_M": (), "MXFP4": (),
    "NVFP4": (), "Q4_1": (0, 2), "Q5_1": (0, 2), "TQ1_0": (52,), "TQ2_0": (64,),
}  # fmt: skip
BITS = {
    "Q5_0": 5, "Q5_1": 5, "Q4_K": 4, "Q5_K": 5, "TQ1_0": 2, "TQ2_0": 2, "Q6_K": 8, "Q3_K": 6, "IQ4_NL": 6,
    "IQ4_XS": 6, "NVFP4": 6, "IQ3_S": 6, "IQ3_XXS": 6,
}  # fmt: skip
SINGLE_SCALE = ("Q5_0", "Q5_1", "Q4_K", "Q5_K", "TQ1_0", "TQ2_0")


def sizes(kind: str) -> tuple[int, int]:
    return next((block, size) for name, block, size in TENSOR_TYPES.values() if name == kind)


def stored(folder: Path, kind: str) -> tuple[Place, np.ndarray]:
    """Random blocks of a type in a file, and the values that the `gguf` package reads from them."""
    block, size = sizes(kind)
    rng = np.random.default_rng(len(kind) + size)
    count = int(np.prod(SHAPE)) // block
    data = rng.integers(0, 256, (count, size), dtype=np.uint8)
    if kind in FLOATS:
        dtype = {"F32": "<f4", "F64": "<f8", "F16": "<f2"}.get(kind)
        values = rng.normal(size=count)
        bf16 = (values.astype("<f4").view("<u4") >> 16).astype("<u2")
        data = (values.astype(dtype) if dtype else bf16).view(np.uint8).reshape(count, -1)
    for place in HALVES.get(kind, (0,)) if kind not in FLOATS else ():
        halves = (rng.uniform(0.5, 2, count) * rng.choice([-1, 1], count) / 64).astype("<f2")
        data[:, place : place + 2] = halves.view(np.uint8).reshape(-1, 2)
    if kind == "IQ1_M":  # a float16 lies in the highest four bits of four words
        for place, half in ((49, 0x10), (51, 0x20), (53, 0x00), (55, 0x20)):
            data[:, place] = data[:, place] & 15 | half
    if kind == "MXFP4":
        data[:, 0] = rng.integers(118, 128, count)
    if kind == "NVFP4":
        data[:, :4] = rng.integers(8, 0x60, (count, 4))
    path = folder / kind
    path.write_bytes(bytes(7) + data.tobytes())
    if kind == "F64":
        wanted = data.view("<f8").astype(np.float32)
    else:
        number = gguf.GGMLQuantizationType[kind]
        row = data.reshape(*SHAPE[:-1], -1)
        wanted = gguf.dequantize(row.view(np.float32) if kind == "F32" else row, number)
    wanted = wanted.astype(np.float32).reshape(SHAPE)
    assert np.isfinite(wanted).all() and wanted.std() > 0
    return Place(path, 7, data.nbytes), wanted


def values(packed: Packed) -> np.ndarray:
    return np.array(packed.dense().astype(mx.float32))


def test_all_types_of_the_gguf_package_have_a_place() -> None:
    """But whole numbers, the two forms that activations take, and what the package does not decode."""
    left_out = {"Q8_1", "Q8_K", "Q1_0", "I8", "I16", "I32", "I64"}
    known = {number: name for number, (name, _, _) in TENSOR_TYPES.items()}
    assert known == {kind.value: kind.name for kind in gguf.GGMLQuantizationType if kind.name not in left_out}
    for name, block, size in TENSOR_TYPES.values():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] == (block, size)


@pytest.mark.parametrize("kind", sorted(FLOATS))
def test_floats(tmp_path: Path, kind: str) -> None:
    place, wanted = stored(tmp_path, kind)
    found = read_float(place, SHAPE, kind)
    assert found.dtype == {"F16": mx.float16, "BF16": mx.bfloat16}.get(kind, mx.float32)
    assert np.array_equal(np.array(found.astype(mx.float32)), wanted)


@pytest.mark.parametrize("kind", sorted(NATIVE))
def test_types_of_mlx_stay_bit_for_bit(tmp_path: Path, kind: str) -> None:
    """Up to the rounding of a dequantized value to float16, MLX's type for it here (bfloat16 of MXFP4)."""
    place, wanted = stored(tmp_path, kind)
    packed = read_packed(place, SHAPE, kind)
    assert packed.bits == (8 if kind == "Q8_0" else 4) and packed.weight.shape[:-1] == SHAPE[:-1]
    np.testing.assert_allclose(values(packed), wanted, rtol=2e-3, atol=2e-3 * np.abs(wanted).max())
    if kind == "MXFP4":
        assert np.array_equal(values(packed), wanted)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_the_arrays_of_mlx_own_reader(tmp_path: Path, kind: str) -> None:
    place, _ = stored(tmp_path, kind)
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    rows = np.fromfile(place.path, np.uint8, offset=place.offset).reshape(15, -1)
    writer.add_tensor("x.weight", rows, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    raw = mx.load(str(tmp_path / "m.gguf"), format="gguf")
    assert isinstance(raw, dict)
    for part, array in read_packed(place, (15, 512), kind).parts.items():
        assert array.dtype == raw[f"x.{part}"].dtype and mx.array_equal(array, raw[f"x.{part}"])


@pytest.mark.parametrize(
    "kind", [name for name, _, _ in TENSOR_TYPES.values() if name not in FLOATS and name not in NATIVE]
)
def test_other_types_are_packed_anew(tmp_path: Path, kind: str) -> None:
    """Whole numbers are the file's where a group has one scale; else half a step of MLX's grid, and the rounding of
    scale and bias to float16, bound the error."""
    place, wanted = stored(tmp_path, kind)
    error = PackingError()
    packed = repack(place, SHAPE, kind, error)
    assert packed.bits == BITS.get(kind, 4)
    groups, got = wanted.reshape(-1, 32), values(packed).reshape(-1, 32)
    size = np.abs(groups).max(axis=1)
    steps = 0 if kind in SINGLE_SCALE else np.ptp(groups, axis=1) / (2**packed.bits - 1)
    bound = 0.5 * steps + 4 * size * 2.0**-10  # of scale, bias, their sum, and a product
    assert (np.abs(got - groups).max(axis=1) <= bound + 1e-7).all()
    assert error.count == wanted.size
    assert error.largest == pytest.approx(np.abs(got - groups).max(), rel=1e-6)
    assert error.absolute / error.count == pytest.approx(np.abs(got - groups).mean(), rel=1e-4)
    assert "mean error" in str(error) and "largest" in str(error)


@pytest.mark.parametrize("kind", ["Q5_1", "Q6_K"])
def test_pieces_make_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    place, _ = stored(tmp_path, kind)
    whole_error, error = PackingError(), PackingError()
    whole = repack(place, SHAPE, kind, whole_error)
    monkeypatch.setattr("redrafter_mlx.loading.gguf.tensors.PIECE", 1100)  # two rows
    packed = repack(place, SHAPE, kind, error)
    for name, array in whole.parts.items():
        assert mx.array_equal(packed.parts[name], array)
    assert (error.count, error.largest) == (whole_error.count, whole_error.largest)
    assert error.absolute == pytest.approx(whole_error.absolute, rel=1e-9)

"""Damaged and hostile files: one clear error, soon, with nothing left behind; never a signal, never other weights."""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cases.command import convert, convert_within, generate, redrafter, refused, works_or_refused
from tests.cases.gguf_file import Raw, save_gguf
from tests.cases.models import edit_config, edit_header

# isort: split
import numpy as np

Copy = Callable[..., Path]
DEEP = "[" * 100_000


@pytest.fixture(scope="module")
def apples(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """A drafter in Apple's format, which the converter reads. Not to be changed."""
    folder = tmp_path_factory.mktemp("apples") / "drafter"
    assert convert("export", model / "drafter", "--out", folder).code == 0
    return folder


def apples_copy(apples: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(apples, tmp_path / "apples"))


def entry(name: str, **changes: Any) -> Callable[[dict[str, Any], bytes], tuple[dict[str, Any], bytes]]:
    """An edit of one tensor's entry; None takes a key out of it."""

    def change(header: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
        values = {key: value for key, value in {**header[name], **changes}.items() if value is not ...}
        return {**header, name: values}, data

    return change


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "F64"}, {"dtype": None}, {"shape": ...}, {"shape": [31, 32]}, {"shape": ["32", "32"]},
        {"shape": [2**40, 2**40]}, {"data_offsets": [0]}, {"data_offsets": None},
    ],
    ids=str,
)  # fmt: skip
def test_a_safetensors_header_that_cannot_be(
    changes: dict[str, Any], apples: Path, copy: Copy, tmp_path: Path
) -> None:
    drafter, folder = apples_copy(apples, tmp_path), copy()
    for path in (drafter, folder, folder / "drafter"):
        name = "rnn_u.weight" if path != folder else "model.norm.weight"
        edit_header(path / "model.safetensors", entry(name, **changes))
    refused(convert("drafter", drafter, "--out", tmp_path / "out"), "model.safetensors")
    refused(convert("info", drafter), "model.safetensors")
    refused(generate(folder), "model.safetensors")
    refused(convert("target", folder, "--out", tmp_path / "out"), "model.safetensors")
    shutil.copy(tmp_path / "copy" / "drafter" / "model.safetensors", drafter)
    refused(generate(copy("good"), "--drafter", drafter), "model.safetensors")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("shift", [None, 1, -4], ids=["the same bytes twice", "a gap", "an overlap"])
def test_tensors_that_share_bytes_or_leave_some(shift: int | None, apples: Path, tmp_path: Path) -> None:
    drafter = apples_copy(apples, tmp_path)

    def change(header: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
        place = header["rnn_u.weight"]["data_offsets"]
        if shift is None:
            return {**header, "rnn_w.weight": {**header["rnn_w.weight"], "data_offsets": place}}, data
        moved = [place[0] + shift, place[1] + shift]
        return {**header, "rnn_u.weight": {**header["rnn_u.weight"], "data_offsets": moved}}, data

    edit_header(drafter / "model.safetensors", change)
    refused(convert("drafter", drafter, "--out", tmp_path / "out"), "model.safetensors")


@pytest.mark.parametrize("dtype", ["F32", "F64"])
def test_weights_of_a_conversion_that_are_no_numbers(dtype: str, apples: Path, tmp_path: Path) -> None:
    """Or that float32 cannot hold."""
    drafter = apples_copy(apples, tmp_path)
    if dtype == "F64":
        (drafter / "model.safetensors").unlink()
        body, name = _torch_tensor("lm_head.0.weight", 4), "lm_head.0.weight"
        _torch_file(drafter / "model.pt", body, struct.pack("<d", 1e300) * 4)
    else:
        name = "rnn_w.weight"

        def spoil(header: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
            begin = header[name]["data_offsets"][0]
            return header, data[:begin] + struct.pack("<f", float("nan")) + data[begin + 4 :]

        edit_header(drafter / "model.safetensors", spoil)
    refused(convert("drafter", drafter, "--out", tmp_path / "out"), name)


def test_json_nested_deeper_than_its_parser_goes(apples: Path, copy: Copy, tmp_path: Path) -> None:
    folder, drafter = copy(), apples_copy(apples, tmp_path)
    (folder / "config.json").write_text('{"a":' + DEEP)
    (drafter / "config.json").write_text('{"a":' + DEEP)
    refused(generate(folder), "config.json")
    refused(convert("info", drafter), "config.json")
    refused(convert("drafter", drafter, "--out", tmp_path / "out"), "config.json")
    folder = copy("tokenizer")
    (folder / "tokenizer.json").write_text(DEEP)
    refused(generate(folder), "tokenizer")
    edit_header(drafter / "model.safetensors", lambda header, data: (DEEP.encode(), data))
    refused(convert("info", drafter))


def _torch_tensor(name: str, size: int) -> bytes:
    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    storage = b"(" + text("storage") + b"ctorch\nDoubleStorage\n" + text("0") + text("cpu") + b"J"
    storage += struct.pack("<i", size) + b"tQ"
    shape = b"(J" + struct.pack("<i", size) + b"t"
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"J\0\0\0\0" + shape + b"(J\1\0\0\0t"
    return b"}(" + text(name) + call + b"\x89ccollections\nOrderedDict\n)RtRu"


def _torch_file(path: Path, body: bytes, storage: bytes | None = None) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + body + b".")
        if storage is not None:
            archive.writestr("archive/data/0", storage)
    return path


@pytest.mark.parametrize(
    "body",
    [
        b")q\0" + b"h\0h\0\x86q\0" * 60 + b"}h\0K\1s",
        b"](" + b"N" * 40_000 + b"eq\0ctorch\nSize\nq\1(" + b"h\1h\0\x85R" * 40_000 + b"t",
    ],
    ids=["a key whose hash takes 2**60 steps", "copies of copies"],
)
def test_a_pickle_that_never_ends(body: bytes, tmp_path: Path) -> None:
    refused(convert_within(20, "info", _torch_file(tmp_path / "model.pt", body)), "model.pt")


def test_many_tensors(tmp_path: Path) -> None:
    """DeepSeek-V3 has 91,991: in time that grows with their square this would not end."""
    count = 60_000
    entries = {f"model.layers.{i}.x.weight": {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]}
               for i in range(count)}  # fmt: skip
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    header = json.dumps(entries).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4 * count))
    works_or_refused(convert_within(30, "info", tmp_path))
    works_or_refused(convert_within(30, "drafter", tmp_path, "--out", tmp_path / "out"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", 0), ("hidden_size", True), ("hidden_size", 10**12), ("num_attention_heads", 0),
        ("num_attention_heads", 10**6), ("vocab_size", -1), ("vocab_size", 2**31), ("rope_scaling", 5),
        ("rope_scaling", []), ("max_position_embeddings", "576"), ("max_position_embeddings", 1.5),
        ("rope_theta", "x"), ("model_type", "base"), ("num_hidden_layers", 2**63),
    ],
)  # fmt: skip
def test_values_that_a_targets_config_cannot_have(key: str, value: Any, copy: Copy, tmp_path: Path) -> None:
    folder = edit_config(copy(drafter=False), **{key: value})
    refused(generate(folder))
    if works_or_refused(convert("target", folder, "--out", tmp_path / "out")):
        assert generate(tmp_path / "out").code == 0, "what was converted loads"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("eos_token_id", "two"), ("eos_token_id", 1.5), ("eos_token_id", {}), ("tie_word_embeddings", "no"),
        ("rms_norm_eps", True), ("rms_norm_eps", 10**12), ("head_dim", ""), ("head_dim", 10**400),
        ("quantization_config", 0), ("quantization_config", []), ("text_config", 5), ("text_config", None),
    ],
)  # fmt: skip
def test_what_the_converter_takes_loads(key: str, value: Any, copy: Copy, tmp_path: Path) -> None:
    folder = edit_config(copy(drafter=False), **{key: value})
    works_or_refused(generate(folder))
    works_or_refused(convert("info", folder))
    if works_or_refused(convert("target", folder, "--out", tmp_path / "out")):
        assert generate(tmp_path / "out").code == 0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("context_layers", 5), ("context_layers", ["a"]), ("calibration", [None]), ("draft_vocab_size", "5"),
        ("quantization", 4), ("quantization", {"bits": 4}), ("vocab_size", 2**31), ("num_draft_layers", 10**6),
        ("hidden_size", 10**12),
    ],
)  # fmt: skip
def test_values_that_a_drafters_config_cannot_have(key: str, value: Any, copy: Copy) -> None:
    folder = copy()
    edit_config(folder / "drafter", **{key: value})
    refused(generate(folder, "--draft", "2x3"), key)


@pytest.mark.parametrize(
    "change",
    [
        {"model": None}, {"model": {"type": "Own"}}, {"decoder": 5}, {"pre_tokenizer": "x"}, {"added_tokens": None},
        {"version": None}, {"truncation": "x"}, {"padding": {"a": 1}}, {"normalizer": [1]},
        {"model": {"type": "WordLevel", "vocab": {"w0": -1}, "unk_token": "w0"}},
    ],
    ids=str,
)  # fmt: skip
def test_a_damaged_tokenizer(change: dict[str, Any], copy: Copy) -> None:
    folder = copy(drafter=False)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    refused(generate(folder), "tokenizer")


@pytest.mark.parametrize(
    "change",
    [{"eos_token": 5}, {"tool_parser_type": "own"}, {"tokenizer_class": 5}, {"model_max_length": "x"}],
    ids=str,
)
def test_a_tokenizers_settings_that_cannot_be(change: dict[str, Any], copy: Copy) -> None:
    folder = copy(drafter=False)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    refused(generate(folder))


@pytest.mark.parametrize(
    ("ids", "is_right"), [(range(8, 24), True), ([*range(8, 23), 262], False), ([-1, *range(9, 24)], False)]
)
def test_a_drafters_vocabulary_lies_in_the_targets(
    ids: list[int], is_right: bool, copy: Copy, tmp_path: Path
) -> None:
    from redrafter_mlx.drafters.kinds import save_drafter
    from tests import toy

    # isort: split
    import mlx.core as mx

    folder = copy()
    loaded = toy.make_target(vocab_size=262)
    drafter = toy.make_drafter(loaded, draft_vocab_size=16)
    save_drafter(drafter, tmp_path / "drafter")
    path = tmp_path / "drafter" / "model.safetensors"
    weights = dict(mx.load(str(path)))
    differences = np.array(list(ids)) - np.arange(16)
    weights["d2t"] = mx.array(differences).astype(weights["d2t"].dtype)
    mx.eval(weights)
    mx.save_safetensors(str(path.with_name("new.safetensors")), weights)
    path.with_name("new.safetensors").replace(path)
    done = generate(folder, "--drafter", tmp_path / "drafter", "--draft", "2x3", "--max-tokens", 12)
    if is_right:
        assert done.tokens == generate(folder, "--drafter", "none", "--max-tokens", 12).tokens
    else:
        refused(done, "d2t")


def u32(number: int) -> Raw:
    return 4, struct.pack("<I", number)


@pytest.mark.parametrize(
    "change",
    [
        {"llama.attention.head_count": 0}, {"llama.attention.head_count": "4"}, {"llama.embedding_length": [64, 64]},
        {"llama.context_length": "many"}, {"llama.attention.layer_norm_rms_epsilon": "small"},
        {"llama.block_count": u32(2**32 - 1)}, {"llama.block_count": 10**6}, {"general.alignment": "32"},
        {"tokenizer.ggml.bos_token_id": [1, 2]}, {"tokenizer.ggml.token_type": 3},
        {"tokenizer.ggml.merges": ["zz yy"]}, {"tokenizer.chat_template": 5},
        {"deep": (9, struct.pack("<IQ", 9, 1) * 600 + struct.pack("<IQ", 4, 0))},
    ],
    ids=lambda change: str(change)[:40],
)  # fmt: skip
def test_a_ggufs_metadata_of_wrong_types(change: dict[str, Any], tmp_path: Path) -> None:
    path = save_gguf(tmp_path / "x.gguf", change)
    refused(generate(path), "x.gguf")
    works_or_refused(convert("info", path))
    if works_or_refused(convert("target", path, "--out", tmp_path / "out")):
        assert generate(tmp_path / "out").code == 0
    assert not list(tmp_path.glob(".out*")), "nothing is left"


def test_a_gguf_with_a_float64(tmp_path: Path) -> None:
    """MLX's own reader ends with a signal there."""
    path = save_gguf(tmp_path / "x.gguf", {"training.loss": (12, struct.pack("<d", 0.5))})
    works_or_refused(generate(path))
    works_or_refused(convert("target", path, "--out", tmp_path / "out"))
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize(
    "lie",
    [
        {"offsets": {"blk.0.ffn_down.weight": 0}},
        {"offsets": {"blk.0.ffn_down.weight": 33}},
        {"changes": {"general.alignment": 7}},
        {"changes": {"general.alignment": (10, struct.pack("<Q", 64))}, "alignment": 64},
    ],
    ids=str,
)
def test_a_ggufs_tensors_somewhere_else(lie: dict[str, Any], tmp_path: Path) -> None:
    good, bad = save_gguf(tmp_path / "good.gguf"), save_gguf(tmp_path / "bad.gguf", **lie)
    if works_or_refused(done := generate(bad)):
        assert done.tokens == generate(good).tokens


def test_a_cost_table_that_cannot_be_used(
    copy: Copy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDRAFTER_CACHE", str(tmp_path / "cache"))
    folder = copy()
    assert generate(folder).code == 0
    [path] = (tmp_path / "cache" / "cost").iterdir()
    good = json.loads(path.read_text())
    for damage in (
        {**good, "rows": {}},
        {**good, "rows": {key: float("nan") for key in good["rows"]}},
        DEEP,
        5,
    ):
        path.write_text(damage if isinstance(damage, str) else json.dumps(damage))
        assert generate(folder).code == 0
        assert json.loads(path.read_text()).keys() == good.keys(), "measured again"


def test_out_on_another_disk(apples: Path, copy: Copy, tmp_path: Path) -> None:
    """A mounted volume or a link: files cannot be moved there by a rename."""
    other = Path("/dev/shm")
    if not other.is_dir() or os.stat(other).st_dev == os.stat(tmp_path).st_dev:
        pytest.skip("there is no second file system here")
    with tempfile.TemporaryDirectory(dir=other) as place:
        for command, source in (("drafter", apples), ("target", copy())):
            (tmp_path / command).symlink_to(Path(place, command))
            Path(place, command).mkdir()
            assert convert(command, source, "--out", tmp_path / command).code == 0
            assert Path(place, command, "model.safetensors").is_file()


def test_extreme_options(model: Path) -> None:
    refused(generate(model, "--stop", ""), "stop")
    done = redrafter("demo", "hi", "--model", model, "--max-tokens", 1, "--draft", "2x3")
    works_or_refused(done)

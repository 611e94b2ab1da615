"""Medusa's heads as their authors and vLLM publish them become folders of ours with the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.heads import IDS, MEDUSA, Arrays, make_medusa, published
from tests.test_convert_torch_file import write_torch
from tests.toy import HIDDEN, VOCAB, save_folder

# isort: split
import mlx.core as mx
import numpy as np

from convert.__main__ import main
from redrafter_mlx.drafters.kinds import load_drafter
from redrafter_mlx.drafters.medusa import Medusa
from redrafter_mlx.files import named_weights
from redrafter_mlx.generation import generate
from redrafter_mlx.loading.load import load

# as uploaded for Vicuna: two heads where the file has more
THEIRS: dict[str, Any] = {
    "base_model_name_or_path": "owner/target", "medusa_num_heads": 2, "medusa_num_layers": 1,
    "transformers_version": "4.31.0",
}  # fmt: skip
VLLM: dict[str, Any] = {
    "architectures": ["MedusaModel"], "model_type": "medusa", "hidden_size": HIDDEN, "vocab_size": VOCAB,
    "num_heads": 3, "num_hidden_layers": 1, "truncated_vocab_size": VOCAB, "medusa_fc_bias": True,
    "max_paths": 64, "topk": 10,
}  # fmt: skip


def save(
    folder: Path, config: dict[str, Any] | None, tensors: Arrays, name: str = "medusa_lm_head.pt"
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if name.endswith(".pt"):
        write_torch(folder / name, tensors)
    else:
        arrays = {key: mx.array(array) for key, array in tensors.items()}
        mx.save_safetensors(str(folder / name), arrays, metadata={"format": "pt"})
    return folder


def convert(source: Path, out: Path, *options: str) -> Medusa:
    assert main(["drafter", str(source), "--out", str(out), *options]) == 0
    drafter = load_drafter(out)
    assert isinstance(drafter, Medusa)
    return drafter


def check(found: Medusa, original: Medusa) -> None:
    """The same weights to the bit, and the same counts."""
    assert named_weights(found).keys() == named_weights(original).keys()
    for name, array in named_weights(original).items():
        assert mx.array_equal(named_weights(found)[name], array).item(), name
    for field in ("num_heads", "num_layers", "stored_blocks", "output", "draft_vocab_size"):
        assert getattr(found.config, field) == getattr(original.config, field), field


@pytest.mark.parametrize("name", ["one_layer", "three_layers", "one_block_three_times"])
@pytest.mark.parametrize("config", [THEIRS, None])
def test_first_version(
    name: str, config: dict[str, Any] | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Heads and blocks are counted in the file; blocks that are copies are stored once."""
    original = make_medusa(**MEDUSA[name])
    found = convert(save(tmp_path / "in", config, published(original)), tmp_path / "out")
    check(found, original)
    said = capsys.readouterr().err
    if config is not None:
        assert "config.json says medusa_num_heads 2, the tensors hold 3: the tensors count" in said
        assert ("medusa_num_layers 1, the tensors hold 3" in said) == (name != "one_layer")
        assert found.config.target == {"name": "owner/target", "hidden_size": HIDDEN, "vocab_size": VOCAB}
    again = convert(tmp_path / "in" / "medusa_lm_head.pt", tmp_path / "again")
    check(again, original)


def test_copies_differ_in_one_head(tmp_path: Path) -> None:
    original = make_medusa(num_layers=2)
    tensors = published(make_medusa(num_layers=2, num_blocks=1))
    tensors["1.1.linear.bias"] = np.array(original.heads[1].blocks[1].linear.bias)
    found = convert(save(tmp_path / "in", THEIRS, tensors), tmp_path / "out")
    assert found.config.stored_blocks == 2
    assert mx.array_equal(
        found.heads[0].blocks[0].linear.weight, found.heads[0].blocks[1].linear.weight
    ).item()
    np.testing.assert_array_equal(found.heads[1].blocks[1].linear.bias, tensors["1.1.linear.bias"])


def test_second_version_takes_the_targets_output(tmp_path: Path) -> None:
    """From the published file to text, which is what the target writes alone."""
    target = save_folder(tmp_path / "target")
    vocab = json.loads((target / "config.json").read_text())["vocab_size"]
    original = make_medusa(vocab_size=vocab, output="target")
    config = {**THEIRS, "medusa_num_heads": 3, "version": "2"}
    source = save(tmp_path / "in", config, published(original), "medusa_lm_head.safetensors")
    found = convert(source, tmp_path / "out", "--target", str(target))
    check(found, original)
    assert found.config.target == {"name": "target", "hidden_size": HIDDEN, "vocab_size": vocab}
    model = load(target, tmp_path / "out")
    _, plain = generate(model, [5, 9, 33], max_tokens=24, draft="off")
    _, stats = generate(model, [5, 9, 33], max_tokens=24, draft="4x4")
    assert stats.token_ids == plain.token_ids and stats.drafted_tokens > 0


def test_in_their_targets_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Medusa-2: the config is the target's, with two keys more."""
    original = make_medusa()
    tensors = {f"medusa_head.{name}": array for name, array in published(original).items()}
    tensors["model.norm.weight"] = np.ones((HIDDEN,), dtype=np.float32)
    config = {"model_type": "llama", "vocab_size": VOCAB, "medusa_num_heads": 3, "medusa_num_layers": 1}
    source = save(tmp_path / "in", config, tensors, "model.safetensors")
    check(convert(source, tmp_path / "out"), original)
    assert "1 tensors beside the heads are left out" in capsys.readouterr().err


def test_a_checkpoint_of_both_splits_in_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Medusa-2's folder gives a target and heads that fit each other."""
    source = save_folder(tmp_path / "both")
    settings = json.loads((source / "config.json").read_text())
    original = make_medusa(vocab_size=settings["vocab_size"])
    weights = mx.load(str(source / "model.safetensors"))
    assert isinstance(weights, dict)
    weights |= {f"medusa_head.{name}": mx.array(array) for name, array in published(original).items()}
    mx.save_safetensors(str(source / "model.safetensors"), weights)
    (source / "config.json").write_text(
        json.dumps({**settings, "medusa_num_heads": 3, "medusa_num_layers": 1})
    )
    assert main(["target", str(source), "--out", str(tmp_path / "target")]) == 0
    assert "9 tensors of a drafter are left out" in capsys.readouterr().err
    found = convert(source, tmp_path / "target" / "drafter", "--target", str(tmp_path / "target"))
    check(found, original)
    model = load(tmp_path / "target")
    assert isinstance(model.drafter, Medusa)
    capsys.readouterr()
    assert main(["info", str(tmp_path / "target")]) == 0
    assert "kind: target" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["one_layer", "three_layers"])
def test_vllm(name: str, tmp_path: Path) -> None:
    original = make_medusa(**MEDUSA[name])
    config = {**VLLM, "num_hidden_layers": original.config.num_layers}
    check(convert(save(tmp_path / "in", config, published(original, True), "model.safetensors"), tmp_path / "out"),
          original)  # fmt: skip


def test_vllm_without_a_bias(tmp_path: Path) -> None:
    original = make_medusa()
    for head in original.heads:
        head.blocks[0].linear.bias = mx.zeros((HIDDEN,))
    tensors = {name: array for name, array in published(original, True).items() if not name.endswith("bias")}
    config = {**VLLM, "medusa_fc_bias": False}
    check(convert(save(tmp_path / "in", config, tensors, "model.safetensors"), tmp_path / "out"), original)


@pytest.mark.parametrize("stores_all", [False, True])
def test_vllm_of_a_reduced_vocabulary(stores_all: bool, tmp_path: Path) -> None:
    """The rows of the tokens in `token_map`, or those of all tokens, of which these are taken."""
    original = make_medusa(draft_vocab_size=20)
    tensors = published(original, True)
    if stores_all:
        for head in range(3):
            rows = np.zeros((VOCAB, HIDDEN), dtype=np.float32)
            rows[IDS] = tensors[f"lm_heads.{head}.weight"]
            tensors[f"lm_heads.{head}.weight"] = rows
    tensors["token_map"] = np.array(IDS, dtype=np.int64)
    config = {**VLLM, "truncated_vocab_size": 20}
    found = convert(save(tmp_path / "in", config, tensors, "model.safetensors"), tmp_path / "out")
    check(found, original)
    ids = found.target_ids
    assert ids is not None and ids.tolist() == IDS


def test_vllm_with_the_targets_head(tmp_path: Path) -> None:
    original = make_medusa(output="target")
    tensors = {**published(original, True), "lm_heads.0.weight": np.zeros((VOCAB, HIDDEN), dtype=np.float32)}
    config = {**VLLM, "original_lm_head": True}
    check(convert(save(tmp_path / "in", config, tensors, "model.safetensors"), tmp_path / "out"), original)


def test_dtype(tmp_path: Path) -> None:
    tensors = {name: array.astype(np.float16) for name, array in published(make_medusa()).items()}
    source = save(tmp_path / "in", THEIRS, tensors)
    for dtype, options in ((mx.float16, []), (mx.bfloat16, ["--dtype", "bfloat16"])):
        found = convert(source, tmp_path / str(dtype), *options)
        assert {array.dtype for array in named_weights(found).values()} == {dtype}


def error_of(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """What is said of a source that cannot be converted: one line, exit code 2, and nothing left behind."""
    out = tmp_path / "out"
    assert main(["drafter", str(source), "--out", str(out), *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and not out.exists() and not list(tmp_path.glob(".out*"))
    last = captured.err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    return last


def test_wrong_tensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def message(config: dict[str, Any] = THEIRS, is_vllm: bool = False, **changes: np.ndarray | None) -> str:
        name = "model.safetensors" if is_vllm else "medusa_lm_head.pt"
        tensors = {**published(make_medusa(), is_vllm), **changes}
        kept = {key: array for key, array in tensors.items() if array is not None}
        return error_of(save(tmp_path / "in", config, kept, name), tmp_path, capsys)

    small = np.zeros((4, 4), dtype=np.float32)
    said = message(
        **{"1.0.linear.bias": None, "0.1.weight": None, "1.1.weight": np.zeros((4, HIDDEN), np.float32)}
    )
    for wrong in (
        "1.0.linear.bias (32,) is missing",
        "0.1.weight (4, 32) is missing",
        "2.1.weight has shape (64, 32)",
    ):
        assert wrong in said
    said = message(**{f"{head}.1.weight": None for head in range(3)}, **{"2.2.weight": small})
    assert "in/medusa_lm_head.pt lacks 0.1.weight, 1.1.weight, 2.1.weight" in said
    said = message(**{"1.0.linear.bias": None, "2.1.weight": small})
    assert (
        "1.0.linear.bias (32,) is missing" in said
        and "2.1.weight has shape (4, 4), expected (64, 32)" in said
    )
    assert "1 tensors have names that 3 Medusa heads of 1 blocks do not have (3.1.weight)" in message(
        **{"3.1.weight": small}
    )
    assert "(lm_head.weight)" in message(**{"lm_head.weight": small})
    said = message(**{"100000000.0.linear.weight": small})
    assert "its names are those of 100000001 heads, and there can be 1 to 63" in said
    assert "blocks in a head, and there can be 1 to 64" in message(**{"0.70.linear.weight": small})
    assert "0.0.linear.weight must be a matrix, not of shape (4,)" in message(
        **{"0.0.linear.weight": small[0]}
    )
    assert "2.1.weight cannot be of dtype int64" in message(
        **{"2.1.weight": np.zeros((VOCAB, HIDDEN), dtype=np.int64)}
    )
    nan = np.full((HIDDEN,), np.nan, dtype=np.float32)
    assert "heads.0.blocks.0.linear.bias holds values that are not finite" in message(
        **{"0.0.linear.bias": nan}
    )
    (tmp_path / "in" / "medusa_lm_head.pt").unlink()
    bad = np.array([1, 70], dtype=np.int64)
    said = message(VLLM, True, token_map=bad)
    assert "token_map names tokens that lm_heads." in said and "has no row for" in said
    assert "token_map must be a list of token ids, not of shape (4, 4)" in message(
        VLLM, True, token_map=small
    )
    assert "logit_scale 0.5 is not supported, only 1" in message({**VLLM, "logit_scale": 0.5}, True)
    said = message(VLLM, True, **{"blocks.1.layers.0.bias": None})
    assert "blocks.1.layers.0.bias (32,) is missing" in said


def test_what_is_needed_or_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shared = make_medusa(output="target")
    source = save(tmp_path / "shared", THEIRS, published(shared))
    assert "its heads use the target's output matrix: --target is needed" in error_of(
        source, tmp_path, capsys
    )
    source = save(tmp_path / "in", THEIRS, published(make_medusa()))
    said = error_of(source, tmp_path, capsys, "--activation", "linear")
    assert "--activation linear is for recurrent drafters" in said and "Medusa heads" in said
    target = save_folder(tmp_path / "target")
    said = error_of(source, tmp_path, capsys, "--target", str(target))
    assert f"does not fit the target: vocab_size is {VOCAB}" in said
    convert(source, tmp_path / "ours")
    capsys.readouterr()
    assert "already and loads as it is" in error_of(tmp_path / "ours", tmp_path, capsys)
    assert main(["export", str(tmp_path / "ours"), "--out", str(tmp_path / "apple")]) == 2
    assert "is a medusa_heads, and this takes a recurrent" in capsys.readouterr().err
    data = (source / "medusa_lm_head.pt").read_bytes()
    (source / "medusa_lm_head.pt").write_bytes(data[: len(data) // 2])
    assert "medusa_lm_head.pt" in error_of(source, tmp_path, capsys)


def test_info(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def lines(path: Path) -> dict[str, str]:
        capsys.readouterr()
        assert main(["info", str(path)]) == 0
        return dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())

    source = save(tmp_path / "in", THEIRS, published(make_medusa(num_layers=2, num_blocks=1)))
    said = lines(source)
    assert said["kind"] == "Medusa heads" and said["layers of a head"] == "2"
    assert said["drafts"] == "up to 3 tokens: beam length 4, the root counted"
    assert (said["hidden size"], said["vocabulary"], said["made for"]) == ("32", "64", "owner/target")
    convert(source, tmp_path / "ours")
    assert lines(tmp_path / "ours")["kind"] == "Medusa heads of redrafter-mlx; loads as it is"
    shared = save(tmp_path / "shared", THEIRS, published(make_medusa(output="target")))
    assert lines(shared)["vocabulary"] == "the target's" and lines(shared)["output matrix"] == "target"

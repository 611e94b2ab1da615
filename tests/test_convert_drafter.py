"""Drafters of other tools give the source's logits and beams; ours go back to Apple's exactly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import redrafter_mlx  # noqa: F401

# isort: split
import mlx.core as mx
import numpy as np

from convert.__main__ import main
from convert.names import translate
from redrafter_mlx.drafters.kinds import load_recurrent, save_drafter
from redrafter_mlx.drafters.recurrent import DrafterConfig, RecurrentDrafter, changed, quantize
from redrafter_mlx.files import named_weights
from redrafter_mlx.loading.load import load
from tests.test_convert_torch_file import write_torch

GOLDENS = Path(__file__).parent / "goldens"
DIALECTS = GOLDENS / "dialects"
APPLE = GOLDENS / "drafter" / "d01"
INDEX = json.loads((DIALECTS / "index.json").read_text())
SHAPES = [(2, 3), (4, 5), (8, 6)]
Arrays = dict[str, np.ndarray]


def convert(source: Path, out: Path, *options: str) -> RecurrentDrafter:
    assert main(["drafter", str(source), "--out", str(out), *options]) == 0
    return load_recurrent(out)


def check(drafter: RecurrentDrafter, inputs: Arrays, expected: Arrays, prefix: str) -> None:
    """Logits within 1e-4 (float32 sums in another order), beams equal (gaps are at least 1e-3)."""
    table = mx.array(inputs["embedding"])

    def embed(tokens: mx.array) -> mx.array:
        return table[tokens]

    context, tokens = mx.array(inputs["context"]), mx.array(inputs["tf_tokens"])
    states = drafter.states(embed(tokens))
    np.testing.assert_allclose(states, expected["tf_states"], atol=1e-4)
    logits = drafter.logits(context, tokens, embed)
    np.testing.assert_allclose(logits, expected["tf_raw_logits"], atol=1e-4)
    for width, length in SHAPES:
        for row, root in enumerate(inputs["init_tokens"]):
            beams, _ = drafter.beam_search(context[row], int(root), embed, width, length)
            np.testing.assert_array_equal(beams, expected[f"{prefix}beams_{width}x{length}"][row])


@pytest.mark.parametrize("case", INDEX, ids=lambda case: case["dir"])
def test_dialect(case: dict[str, str], tmp_path: Path) -> None:
    io = dict(np.load(GOLDENS / case["expected"]))
    drafter = convert(DIALECTS / case["dir"], tmp_path / "out")
    assert drafter.config.num_draft_layers == 2 and drafter.config.activation == "silu"
    assert drafter.config.vocab_size == len(io["embedding"])
    check(drafter, io, io, "nowarp_")


@pytest.mark.parametrize(("source", "case"), [("trtllm_converted", "d01"), ("modelopt", "d02")])
def test_linear_activation_is_tensorrt_llms(source: str, case: str, tmp_path: Path) -> None:
    io = dict(np.load(GOLDENS / "drafter" / case / "io.npz"))
    expected = dict(np.load(DIALECTS / f"trtllm_linear_rnn_{case}.npz"))
    drafter = convert(DIALECTS / source, tmp_path / "out", "--activation", "linear")
    assert drafter.config.activation == "linear"
    check(drafter, io, expected, "")


def test_a_file_instead_of_its_folder(tmp_path: Path) -> None:
    io = dict(np.load(APPLE / "io.npz"))
    for number, file in enumerate(
        (DIALECTS / "model_pt" / "model.pt", DIALECTS / "sharded" / "model.safetensors.index.json")
    ):
        check(convert(file, tmp_path / str(number)), io, io, "nowarp_")


def test_without_a_config_the_shapes_say_it_all(tmp_path: Path) -> None:
    shutil.copy(APPLE / "model.safetensors", tmp_path / "some_name.safetensors")
    config = convert(tmp_path, tmp_path / "out").config
    sizes = (config.vocab_size, config.hidden_size, config.exit_dim, config.num_draft_layers)
    assert sizes == (64, 16, 24, 2) and config.rnn


def apple_folder(path: Path, tensors: dict[str, mx.array], **config: object) -> Path:
    path.mkdir(parents=True)
    values = json.loads((APPLE / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**values, **config}))
    mx.save_safetensors(str(path / "model.safetensors"), tensors)
    return path


def apple_tensors() -> dict[str, mx.array]:
    tensors = mx.load(str(APPLE / "model.safetensors"))
    assert isinstance(tensors, dict)
    return tensors


def test_tensorrt_llm_ranks_and_padding(tmp_path: Path) -> None:
    """Two ranks hold the upper and lower rows of every tensor; the vocabulary is padded by 2."""
    source = tmp_path / "ranks"
    source.mkdir()
    shutil.copy(DIALECTS / "trtllm_converted" / "config.json", source)
    tensors = mx.load(str(DIALECTS / "trtllm_converted" / "rank0.safetensors"))
    assert isinstance(tensors, dict)
    tensors["drafter.lm_head.weight"] = mx.pad(tensors["drafter.lm_head.weight"], [(0, 2), (0, 0)])
    tensors["transformer.vocab_embedding.weight"] = mx.zeros((4, 4))
    for rank in range(2):
        half = {name: mx.split(array, 2)[rank] for name, array in tensors.items()}
        mx.save_safetensors(str(source / f"rank{rank}.safetensors"), half)
    io = dict(np.load(APPLE / "io.npz"))
    check(convert(source, tmp_path / "out"), io, io, "nowarp_")


def test_rows_that_are_no_padding_are_not_cut_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in"
    shutil.copytree(DIALECTS / "trtllm_converted", source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "vocab_size": config["vocab_size"] - 1}))
    found = fails(source, tmp_path, capsys)
    assert "config.json says vocab_size 63, and lm_head.2.weight has 64 rows" in found


@pytest.mark.parametrize(
    ("value", "options"),
    [
        (float("nan"), []),
        (float("inf"), []),
        (7e4, ["--dtype", "float16"]),
        (3.4e38, ["--dtype", "bfloat16"]),
    ],
)
def test_weights_that_are_no_numbers(
    value: float, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the source, or once they are cast to a dtype that cannot hold them."""
    tensors = apple_tensors()
    tensors["rnn_w.weight"][3, 5] = value
    source = apple_folder(tmp_path / "in", tensors)
    found = fails(source, tmp_path, capsys, *options)
    assert "rnn_w.weight holds values that are not finite" in found and str(source) in found


def test_a_float64_that_float32_cannot_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrays = {name: np.array(array).astype(np.float64) for name, array in apple_tensors().items()}
    source = tmp_path / "in"
    source.mkdir()
    shutil.copy(APPLE / "config.json", source)
    write_torch(source / "model.pt", arrays)
    io = dict(np.load(APPLE / "io.npz"))
    check(convert(source, tmp_path / "ours"), io, io, "nowarp_")
    capsys.readouterr()
    arrays["lm_head.2.weight"][0, 0] = 1e300
    write_torch(source / "model.pt", arrays)
    assert "lm_head.2.weight holds values that are not finite" in fails(source, tmp_path, capsys)


def test_a_name_cannot_ask_for_a_million_blocks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = apple_tensors()
    tensors["lm_head.1000000.weight"] = tensors.pop("lm_head.2.weight")
    found = fails(apple_folder(tmp_path / "in", tensors), tmp_path, capsys)
    assert "number 1000000 blocks" in found


def test_names_of_a_large_model_are_sorted_out_in_one_pass() -> None:
    """40,000 names beside a drafter: minutes where each of them is compared with all others."""
    names = [f"model.layers.{i}.x.weight" for i in range(40_000)]
    mine = ["drafter.lm_head.0.weight", "drafter.rnn_w.weight"]
    assert translate(names + mine).beside == tuple(names)
    assert len(translate(names).unknown) == 40_000


@pytest.mark.parametrize("prefix", ["module.", "module.drafter.", "_orig_mod."])
def test_wrappers(prefix: str, tmp_path: Path) -> None:
    tensors = {f"{prefix}{name}": array for name, array in apple_tensors().items()}
    io = dict(np.load(APPLE / "io.npz"))
    check(convert(apple_folder(tmp_path / "in", tensors), tmp_path / "out"), io, io, "nowarp_")


def test_dtype(tmp_path: Path) -> None:
    tensors = {name: array.astype(mx.bfloat16) for name, array in apple_tensors().items()}
    source = apple_folder(tmp_path / "in", tensors)
    assert convert(source, tmp_path / "kept").rnn_w.weight.dtype == mx.bfloat16
    cast = convert(source, tmp_path / "cast", "--dtype", "float32")
    assert {array.dtype for array in named_weights(cast).values()} == {mx.float32}


def test_target_is_checked_and_recorded(tmp_path: Path) -> None:
    target, source = GOLDENS / "e2e" / "e00" / "target", GOLDENS / "e2e" / "e00" / "drafter"
    config = convert(source, tmp_path / "out", "--target", str(target)).config
    assert config.target["hidden_size"] == 64 and config.target["vocab_size"] == 256
    assert load(target, tmp_path / "out").drafter is not None


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must fail: exit code 2, the reason last on stderr, nothing on stdout."""
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    last = captured.err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    return last


def fails(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    out = tmp_path / "out"
    message = error_of(capsys, "drafter", str(source), "--out", str(out), *options)
    assert not out.exists()
    assert not list(tmp_path.glob(".out*"))
    return message


def test_wrong_tensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = apple_tensors()

    def message(name: str, **changes: mx.array | None) -> str:
        tensors = {**whole, **changes}
        kept = {key: array for key, array in tensors.items() if array is not None}
        return fails(apple_folder(tmp_path / name, kept), tmp_path, capsys)

    found = message("missing", **{"lm_head.1.linear.bias": None, "rnn_w.weight": None})
    assert "lm_head.1.linear.bias (24,) is missing" in found
    assert "rnn_w.weight (16, 16) is missing" in found
    found = message("shape", **{"rnn_u.weight": mx.zeros((12, 12))})
    assert "rnn_u.weight has shape (12, 12), expected (16, 16)" in found
    found = message("no_head", **{"lm_head.2.weight": None})
    assert "must hold one output matrix" in found and "found none" in found
    found = message("flat_head", **{"lm_head.2.weight": mx.zeros((8,))})
    assert "lm_head.2.weight must have the shape (V, exit_dim), not (8,)" in found
    found = message("integers", **{"rnn_w.weight": mx.zeros((16, 16), dtype=mx.int8)})
    assert "floating-point weights, not rnn_w.weight (int8)" in found
    found = message("unknown", **{"speculator.emb.0.weight": mx.zeros((4, 4))})
    assert "1 of its tensors have names that no drafter has (speculator.emb.0.weight)" in found
    found = message("twice", **{"lm_heads.2.weight": mx.zeros((64, 24))})
    assert "lm_head.2.weight and lm_heads.2.weight both mean lm_head.2.weight" in found


def test_wrong_configs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = apple_tensors()

    def message(name: str, **config: object) -> str:
        return fails(apple_folder(tmp_path / name, whole, **config), tmp_path, capsys)

    assert "lm_head.2.weight has shape (64, 24), expected (100, 24)" in message("v", vocab_size=100)
    assert "rnn_w.weight (16, 16) is not expected" in message("rnn", rnn=False)
    assert "rnn must be true or false, not 'yes'" in message("yes", rnn="yes")
    found = message("text", hidden_size="16")
    assert "hidden_size must be a" in found and "integer" in found and "not '16'" in found
    assert "already and loads as it is" in message("ours", head="full")
    (tmp_path / "v" / "config.json").write_text("{")
    assert "is not JSON" in fails(tmp_path / "v", tmp_path, capsys)


def test_wrong_places(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no weights in" in fails(empty, tmp_path, capsys)
    assert "no drafter at" in fails(tmp_path / "absent", tmp_path, capsys)
    shutil.copytree(DIALECTS / "sharded", tmp_path / "shards")
    (tmp_path / "shards" / "model-00002-of-00003.safetensors").unlink()
    assert "shards that are missing: model-00002" in fails(tmp_path / "shards", tmp_path, capsys)
    cut = tmp_path / "cut"
    shutil.copytree(DIALECTS / "modelopt", cut)
    data = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(data[: len(data) // 2])
    assert "is cut short" in fails(cut, tmp_path, capsys)
    target = GOLDENS / "e2e" / "e00" / "target"
    assert "is not a recurrent drafter in a dialect known here" in fails(target, tmp_path, capsys)
    apple = ["--target", str(target)]
    assert "hidden_size is 16" in fails(APPLE, tmp_path, capsys, *apple)


def test_index_cannot_leave_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = {"weight_map": {"rnn_w.weight": "../secret.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "points outside its folder" in fails(tmp_path, tmp_path, capsys)


def test_out_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    (out / "model-00001-of-00002.safetensors").write_text("of an older conversion")
    run = ["drafter", str(APPLE), "--out", str(out)]
    assert f"--out {out} is not empty" in error_of(capsys, *run)
    assert sorted(f.name for f in out.iterdir()) == [
        "model-00001-of-00002.safetensors",
        "notes.txt",
    ]
    assert main([*run, "--force"]) == 0
    capsys.readouterr()
    assert sorted(f.name for f in out.iterdir()) == [
        "config.json",
        "model.safetensors",
        "notes.txt",
    ]
    assert "must be a folder" in error_of(capsys, *run[:-1], str(out / "notes.txt"))


def test_answer_on_stdout_notes_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(DIALECTS / "modelopt_layers_mismatch", tmp_path / "out")
    captured = capsys.readouterr()
    assert captured.out == f"{tmp_path / 'out'}\n"
    assert "num_draft_layers 1, the tensors hold 2 blocks" in captured.err
    assert "12 tensors of the base model" in captured.err


def drafted(drafter: RecurrentDrafter, context: mx.array, table: mx.array) -> tuple[mx.array, mx.array]:
    return drafter.beam_search(context, 3, lambda tokens: table[tokens], 5, 4)


def test_export_is_exact(tmp_path: Path) -> None:
    """Apple's own checkpoint through our format and back: the same bytes."""
    convert(APPLE, tmp_path / "ours")
    assert main(["export", str(tmp_path / "ours"), "--out", str(tmp_path / "apple")]) == 0
    back = mx.load(str(tmp_path / "apple" / "model.safetensors"))
    assert isinstance(back, dict)
    want = apple_tensors()
    assert back.keys() == want.keys()
    for name, array in want.items():
        assert mx.array_equal(back[name], array).item(), name
    config = json.loads((tmp_path / "apple" / "config.json").read_text())
    original = json.loads((APPLE / "config.json").read_text())
    assert {**config, "transformers_version": original["transformers_version"]} == original


@pytest.mark.parametrize("exit_dim", [128, 127, 80], ids=["no_proj", "one_less", "proj"])
@pytest.mark.parametrize("reduced", [None, 90])
def test_export_of_a_factored_head(tmp_path: Path, exit_dim: int, reduced: int | None) -> None:
    """Same logits from a full head; tokens outside a reduced vocabulary are never drafted.

    exit_dim 127 is the case where one more feature would make Apple's code drop input_proj.
    """
    target = load(GOLDENS / "e2e" / "e00" / "target", "none").target
    mx.random.seed(exit_dim)
    config = DrafterConfig(
        256, 64, exit_dim, 2, head="factored", draft_vocab_size=reduced, calibration=(1.0, 1.0)
    )
    ours = RecurrentDrafter(config)
    if reduced is not None:
        ours.d2t = mx.arange(reduced, dtype=mx.int32)  # target ids 0, 2, 4, ...
    save_drafter(ours, tmp_path / "ours")
    run = ["export", str(tmp_path / "ours"), "--out", str(tmp_path / "apple")]
    assert main([*run, "--target", str(GOLDENS / "e2e" / "e00" / "target")]) == 0
    theirs = load_recurrent(tmp_path / "apple")
    assert theirs.config.head == "full" and theirs.config.draft_vocab_size is None
    ours.attach(target)
    hidden, tokens = mx.random.normal((3, 64)), mx.random.randint(0, 256, (3, 4))
    want, got = (
        ours.logits(hidden, tokens, target.embed),
        theirs.logits(hidden, tokens, target.embed),
    )
    ids = ours.target_ids()
    inside = got if ids is None else got[..., ids]
    np.testing.assert_allclose(inside, want, atol=1e-4)
    if ids is not None:
        assert np.sort(np.array(got), axis=-1)[..., : 256 - 90].max() < -9e3
    table = target.embed(mx.arange(256))
    (beams, logprobs), (again, others) = (
        drafted(ours, hidden[0], table),
        drafted(theirs, hidden[0], table),
    )
    np.testing.assert_array_equal(beams, again)
    np.testing.assert_allclose(logprobs, others, atol=1e-4)


def test_export_of_quantized_weights(tmp_path: Path) -> None:
    mx.random.seed(0)
    ours = RecurrentDrafter(DrafterConfig(96, 32, 64, 1))
    quantization = {"bits": 8, "group_size": 32}
    quantize(ours, quantization)
    ours.config = changed(ours.config, quantization=quantization)
    save_drafter(ours, tmp_path / "ours")
    assert main(["export", str(tmp_path / "ours"), "--out", str(tmp_path / "apple")]) == 0
    table, hidden, tokens = (
        mx.random.normal((96, 32)),
        mx.random.normal((2, 32)),
        mx.array([[1], [2]]),
    )
    want = ours.logits(hidden, tokens, lambda t: table[t])
    got = load_recurrent(tmp_path / "apple").logits(hidden, tokens, lambda t: table[t])
    np.testing.assert_allclose(got, want, atol=1e-3)  # quantized matmul sums in another order


def test_export_refuses_what_apples_format_cannot_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    factored = RecurrentDrafter(DrafterConfig(64, 16, 24, 1, head="factored"))
    save_drafter(factored, tmp_path / "factored")
    layers = RecurrentDrafter(DrafterConfig(64, 16, 24, 1, context_layers=(0, 1)))
    save_drafter(layers, tmp_path / "layers")
    out = ["--out", str(tmp_path / "out")]
    assert "--target is needed" in error_of(capsys, "export", str(tmp_path / "factored"), *out)
    found = error_of(capsys, "export", str(tmp_path / "layers"), *out)
    assert "reads the target's layers [0, 1]" in found
    assert "is trained with `redrafter train --context-layers none`" in found
    assert not (tmp_path / "out").exists()

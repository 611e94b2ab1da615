"""Targets: whatever a model comes in, the folder written says the same in mlx-lm and redrafter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import redrafter_mlx as rd

# isort: split
import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
from mlx_lm.utils import load_model
from tokenizers import Tokenizer, models, pre_tokenizers

from convert.__main__ import main
from redrafter_mlx.loading.gguf import load_gguf
from redrafter_mlx.loading.load import load
from tests.test_convert_torch_file import write_torch
from tests.test_loading_gguf import METADATA, tensors_of, tiny_llama, write_gguf

GOLDENS = Path(__file__).parent / "goldens"
E00 = GOLDENS / "e2e" / "e00"
MODELOPT = GOLDENS / "dialects" / "modelopt"


def convert(source: Path | str, out: Path, *options: str) -> Path:
    assert main(["target", str(source), "--out", str(out), *options]) == 0
    return out


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.strip().splitlines()[-1]


def arrays_of(folder: Path) -> dict[str, np.ndarray]:
    arrays = mx.load(str(folder / "model.safetensors"))
    assert isinstance(arrays, dict)
    return {name: np.array(array) for name, array in arrays.items()}


def same_tokens(folder: Path, drafts: tuple[str, ...] = ("3x4",)) -> None:
    """The reference's greedy tokens."""
    io = np.load(E00 / "io.npz")
    model = load(folder, E00 / "drafter")
    for draft in drafts:
        for p in range(2):
            _, stats = rd.generate(model, io[f"p{p}_prompt"].tolist(), max_tokens=64, draft=draft)
            assert stats.token_ids == io[f"p{p}_ar_tokens"].tolist()


@pytest.fixture
def with_tokenizer(tmp_path: Path) -> Path:
    """The e2e target with a word-level tokenizer, a chat template and generation settings."""
    folder = tmp_path / "hf"
    shutil.copytree(E00 / "target", folder)
    words = {f"w{i}": i for i in range(255)} | {"<end>": 255}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    return folder


def test_safetensors(with_tokenizer: Path, tmp_path: Path) -> None:
    out = convert(with_tokenizer, tmp_path / "out")
    same_tokens(out, ("off", "3x4"))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (with_tokenizer / name).read_bytes()
    model, tokenizer = mlx_lm.load(str(out))[:2]
    assert tokenizer.encode("w3 w5") == [3, 5] and tokenizer.eos_token == "<end>"
    want, got = load_model(with_tokenizer)[0], model
    tokens = mx.array([[1, 2, 3]])
    assert mx.array_equal(want(tokens), got(tokens)).item()


def test_pytorch_file(tmp_path: Path) -> None:
    source = tmp_path / "hf"
    source.mkdir()
    shutil.copy(E00 / "target" / "config.json", source)
    write_torch(source / "pytorch_model.bin", arrays_of(E00 / "target"))
    same_tokens(convert(source, tmp_path / "out"))
    assert sorted(f.name for f in tmp_path.iterdir()) == ["hf", "out"]  # nothing left behind


def sharded(folder: Path) -> Path:
    folder.mkdir()
    shutil.copy(E00 / "target" / "config.json", folder)
    arrays = arrays_of(E00 / "target")
    names = [f"pytorch_model-0000{i}-of-00003.bin" for i in (1, 2, 3)]
    where = {tensor: names[i % 3] for i, tensor in enumerate(sorted(arrays))}
    for name in names:
        write_torch(folder / name, {t: arrays[t] for t, file in where.items() if file == name})
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def test_sharded_pytorch_files(tmp_path: Path) -> None:
    same_tokens(convert(sharded(tmp_path / "hf"), tmp_path / "out"))


def test_a_missing_shard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = sharded(tmp_path / "hf")
    (source / "pytorch_model-00002-of-00003.bin").unlink()
    found = error_of(capsys, "target", str(source), "--out", str(tmp_path / "out"))
    assert "shards that are missing: pytorch_model-00002" in found
    assert sorted(f.name for f in tmp_path.iterdir()) == ["hf"]


def test_drafter_beside_the_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """ModelOpt's folder splits into a target and a drafter that fit each other."""
    out = convert(MODELOPT, tmp_path / "target")
    assert "8 tensors of a drafter are left out" in capsys.readouterr().err
    assert "redrafter" not in json.loads((out / "config.json").read_text())
    assert main(["drafter", str(MODELOPT), "--out", str(out / "drafter"), "--target", str(out)]) == 0
    model = load(out)  # finds the drafter folder inside
    assert model.drafter is not None
    plain, drafted = (
        rd.generate(model, [1, 2, 3], max_tokens=20, draft=draft)[1].token_ids for draft in ("off", "2x3")
    )
    assert plain == drafted


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized(bits: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The written weights are those mlx.nn.quantize makes: same tokens as quantizing in memory."""
    options = ["--quantize", "--bits", str(bits), "--group-size", "32"]
    out = convert(E00 / "target", tmp_path / "out", *options)
    assert capsys.readouterr().out == f"{out}\n"  # mlx-lm's own lines go to stderr
    config = json.loads((out / "config.json").read_text())
    assert (config["quantization"]["bits"], config["quantization"]["group_size"]) == (bits, 32)
    want, got = load_model(E00 / "target")[0], load_model(out)[0]
    nn.quantize(want, bits=bits, group_size=32)
    tokens = mx.array([[1, 2, 3, 4]])
    assert isinstance(got.model.layers[0].mlp.up_proj, nn.QuantizedLinear)
    assert mx.array_equal(want(tokens), got(tokens)).item()
    assert rd.generate(load(out, "none"), [1, 2, 3], max_tokens=5)[1].generated_tokens == 5
    again = convert(out, tmp_path / "float", "--dequantize")
    assert "quantization" not in json.loads((again / "config.json").read_text())
    np.testing.assert_allclose(load_model(again)[0](tokens), want(tokens), atol=1e-3)


def test_dtype(tmp_path: Path) -> None:
    out = convert(E00 / "target", tmp_path / "out", "--dtype", "bfloat16")
    arrays = mx.load(str(out / "model.safetensors"))
    assert isinstance(arrays, dict)
    assert {array.dtype for array in arrays.values()} == {mx.bfloat16}
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"


def gguf(path: Path, kind: int, **metadata: Any) -> Path:
    write_gguf(path, {**METADATA, **metadata}, tensors_of(tiny_llama(), kind))
    return path


def greedy(model: nn.Module, count: int = 20) -> list[int]:
    tokens = [5, 9, 40]
    for _ in range(count):
        tokens.append(np.array(model(mx.array([tokens]))[0, -1]).argmax().item())
    return tokens


@pytest.mark.parametrize("kind", [0, 1, 8, 3], ids=["F32", "F16", "Q8_0", "Q4_1"])
def test_gguf(kind: int, tmp_path: Path) -> None:
    """Packed weights stay packed; tokenizer, chat template and all ends of text come along."""
    path = gguf(tmp_path / "m.gguf", kind, **{"tokenizer.ggml.eot_token_id": 3})
    want, tokenizer, _ = load_gguf(path)
    out = convert(path, tmp_path / "out")
    model, again = mlx_lm.load(str(out))[:2]
    assert greedy(model) == greedy(want)
    assert mx.array_equal(model(mx.array([[5, 9]])), want(mx.array([[5, 9]]))).item()
    assert ("scales" in model.model.layers[0].self_attn.q_proj) == (kind in (8, 3))
    assert again.eos_token_ids == tokenizer.eos_token_ids == {2, 3}
    assert type(again.detokenizer) is type(tokenizer.detokenizer)
    for text in ("the thé 42 \n", "!the</s>", ""):
        assert again.encode(text) == tokenizer.encode(text)
    messages = [{"role": "user", "content": "the"}]
    assert again.apply_chat_template(messages) == tokenizer.apply_chat_template(messages)
    theirs = load(path, "none")
    ours = load(out, "none")
    for model_ in (theirs, ours):
        assert model_.tokenizer is not None
    assert (
        rd.generate(ours, "the", max_tokens=9)[1].token_ids
        == rd.generate(theirs, "the", max_tokens=9)[1].token_ids
    )


def test_gguf_of_mixed_types(tmp_path: Path) -> None:
    """llama.cpp keeps some tensors wider: their bits are written per layer."""
    tensors = tensors_of(tiny_llama(), 3)
    for name, (data, kind) in list(tensors.items()):
        if kind == 3 and ("ffn_down" in name or name == "output.weight"):
            tensors[name] = (data, 8)
        if name == "token_embd.weight":
            tensors[name] = (data, 1)
    write_gguf(tmp_path / "m.gguf", METADATA, tensors)
    model = load_model(convert(tmp_path / "m.gguf", tmp_path / "out"))[0]
    assert greedy(model) == greedy(load_gguf(tmp_path / "m.gguf")[0])
    assert (model.lm_head.bits, model.model.layers[0].mlp.up_proj.bits) == (8, 4)


def test_gguf_to_float_and_to_other_bits(tmp_path: Path) -> None:
    path = gguf(tmp_path / "m.gguf", 8)
    tokens = mx.array([[5, 9, 40]])
    want = load_gguf(path)[0](tokens)
    plain = convert(path, tmp_path / "float", "--dequantize", "--dtype", "float32")
    model, config = load_model(plain)
    assert "quantization" not in config and not hasattr(model.lm_head, "bits")
    np.testing.assert_allclose(model(tokens), want, atol=1e-2)
    packed = convert(path, tmp_path / "six", "--quantize", "--bits", "6")
    assert load_model(packed)[0].lm_head.bits == 6


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_gguf_rope_factors(factor: float, tmp_path: Path) -> None:
    """Llama 3.1 and 3.2 differ in the factor only; a GGUF stores its effect on every frequency."""
    dims, theta, original = 16, 500000.0, 8192
    wavelengths = 2 * np.pi * theta ** (np.arange(0, dims, 2) / dims)
    smooth = np.clip((original / wavelengths - 1) / (4 - 1), 0, 1)
    divisors = (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
    path = tmp_path / "m.gguf"
    metadata = {**METADATA, "llama.rope.freq_base": theta}
    write_gguf(path, metadata, {**tensors_of(tiny_llama(), 0), "rope_freqs.weight": (divisors, 0)})
    out = convert(path, tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["rope_scaling"]["factor"] == factor
    tokens = mx.array([[5, 9, 40, 7]])
    want, got = load_gguf(path)[0](tokens), load_model(out)[0](tokens)
    np.testing.assert_allclose(got, want, atol=1e-4)  # the divisors were rounded to float32


def test_rope_factors_that_no_config_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    divisors = np.linspace(1, 8, 8, dtype=np.float32)
    tensors = {**tensors_of(tiny_llama(), 0), "rope_freqs.weight": (divisors, 0)}
    write_gguf(tmp_path / "m.gguf", METADATA, tensors)
    found = error_of(capsys, "target", str(tmp_path / "m.gguf"), "--out", str(tmp_path / "out"))
    assert "scales RoPE in a way that config.json cannot express" in found
    assert [f.name for f in tmp_path.iterdir()] == ["m.gguf"]


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = str(E00 / "target"), ["--out", str(tmp_path / "out")]
    cases = {
        ("--bits", "3"): "--bits 3 needs --quantize",
        ("--group-size", "32"): "--group-size 32 needs --quantize",
        ("--quantize", "--bits", "7"): "argument --bits: invalid choice: 7",
        ("--quantize", "--group-size", "64x"): "argument --group-size: invalid int value: '64x'",
        ("--quantize", "--dequantize"): "not allowed with argument",
        ("--dtype", "int8"): "argument --dtype: invalid choice: 'int8'",
    }
    for options, message in cases.items():
        found = error_of(capsys, "target", source, *out, *options)
        assert found.startswith("error: ") and message in found
    e01 = str(GOLDENS / "e2e" / "e01" / "target")  # hidden size 48
    found = error_of(capsys, "target", e01, *out, "--quantize", "--group-size", "128")
    assert "--group-size 128 fits no layer" in found
    assert "no target at" in error_of(capsys, "target", str(tmp_path / "absent"), *out)
    assert "the following arguments are required: --out" in error_of(capsys, "target", source)
    assert not list(tmp_path.iterdir())


def test_damaged_targets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "hf"
    shutil.copytree(E00 / "target", source)
    run = ["target", str(source), "--out", str(tmp_path / "out")]
    weights = source / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    assert "is cut short" in error_of(capsys, *run)
    arrays = arrays_of(E00 / "target")
    arrays.pop("model.norm.weight")
    mx.save_safetensors(str(weights), {name: mx.array(a) for name, a in arrays.items()})
    assert "Missing 1 parameters: model.norm.weight" in error_of(capsys, *run)
    weights.write_bytes(whole)
    (source / "config.json").write_text('{"model_type": "perceptron"}')
    assert "cannot be loaded as an mlx-lm model" in error_of(capsys, *run)
    (source / "config.json").unlink()
    assert "no file" in error_of(capsys, *run)
    weights.unlink()
    shutil.copy(E00 / "target" / "config.json", source)
    assert "no weights in" in error_of(capsys, *run)
    assert [f.name for f in tmp_path.iterdir()] == ["hf"]


def lines_of(capsys: pytest.CaptureFixture[str], source: Path) -> dict[str, str]:
    assert main(["info", str(source)]) == 0
    out = capsys.readouterr().out
    return dict(line.split(": ", 1) for line in out.splitlines())


def test_info(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dialects = GOLDENS / "dialects"
    found = lines_of(capsys, dialects / "trtllm_converted")
    assert found["kind"] == "recurrent drafter"
    assert found["names"] == "TensorRT-LLM, converted checkpoint"
    assert (found["hidden size"], found["exit_dim"], found["residual blocks"]) == ("16", "24", "2")
    assert "without SiLU" in found["note 1"]
    found = lines_of(capsys, dialects / "modelopt_layers_mismatch")
    assert found["names"] == "NVIDIA ModelOpt" and found["residual blocks"] == "2"
    found = lines_of(capsys, dialects / "model_pt")
    assert found["files"] == "PyTorch, weights only: model.pt" and found["values"] == "4,056 float32"
    found = lines_of(capsys, E00 / "target")
    assert (found["kind"], found["model type"], found["layers"]) == ("target", "llama", "3")
    found = lines_of(capsys, gguf(tmp_path / "m.gguf", 8))
    assert found["kind"] == "target, GGUF" and "Q8_0" in found["tensors"]
    assert main(["drafter", str(dialects / "model_pt"), "--out", str(tmp_path / "ours")]) == 0
    capsys.readouterr()
    found = lines_of(capsys, tmp_path / "ours")
    assert found["kind"].startswith("recurrent drafter of redrafter-mlx") and found["head"] == "full"


class FakeHub:
    """Stands in for Hugging Face: one repository, whose weights are PyTorch files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[str] = []

    def model_info(self, _: str, revision: str | None, timeout: float) -> SimpleNamespace:
        return SimpleNamespace(
            siblings=[SimpleNamespace(rfilename=file.name) for file in self.folder.iterdir()]
        )

    def snapshot_download(self, _: str, revision: str | None, allow_patterns: list[str]) -> str:
        self.asked = allow_patterns
        return str(self.folder)


def test_hugging_face_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub(sharded(tmp_path / "hf"))
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    same_tokens(convert("owner/model", tmp_path / "out"))
    assert "*.bin" in hub.asked and "*.safetensors" not in hub.asked


def test_hugging_face_unreachable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> FakeHub:
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.HfApi", refuse)
    found = error_of(capsys, "target", "owner/model", "--out", str(tmp_path / "out"))
    assert "no target 'owner/model' here, and none from Hugging Face: " in found
    assert "cannot be reached (no route)" in found


def copy_of(target: Path, to: Path, **changes: Any) -> Path:
    """A target's folder with changes to its config; None takes a key away."""
    shutil.copytree(target, to)
    config = {**json.loads((to / "config.json").read_text()), **changes}
    (to / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return to


def spoil(folder: Path, name: str, value: float) -> Path:
    """Set one weight."""
    arrays = arrays_of(folder)
    arrays[name].flat[7] = value
    mx.save_safetensors(str(folder / "model.safetensors"), {k: mx.array(a) for k, a in arrays.items()})
    return folder


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("value", "options"),
    [
        (float("nan"), []),
        (float("inf"), []),
        (-float("inf"), ["--quantize"]),
        (1e5, ["--dtype", "float16"]),
        (3.4e38, ["--dtype", "bfloat16"]),
    ],
)
def test_weights_that_are_no_numbers(
    value: float, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the source, or once they are cast to a dtype that cannot hold them."""
    source = spoil(copy_of(E00 / "target", tmp_path / "hf"), UP, value)
    found = error_of(capsys, "target", str(source), "--out", str(tmp_path / "out"), *options)
    assert f"{UP} holds values that are not finite" in found and str(source) in found
    assert [f.name for f in tmp_path.iterdir()] == ["hf"]


def test_a_float64_that_float32_cannot_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = copy_of(E00 / "target", tmp_path / "hf")
    (source / "model.safetensors").unlink()
    arrays = {name: array.astype(np.float64) for name, array in arrays_of(E00 / "target").items()}
    write_torch(source / "pytorch_model.bin", arrays)
    same_tokens(convert(source, tmp_path / "out"))
    capsys.readouterr()
    arrays[UP].flat[7] = 1e300
    write_torch(source / "pytorch_model.bin", arrays)
    found = error_of(capsys, "target", str(source), "--out", str(tmp_path / "other"))
    assert f"pytorch_model.bin: {UP} holds values that are not finite" in found


def test_rope_settings_as_transformers_5_writes_them(tmp_path: Path) -> None:
    """mlx-lm reads `rope_theta` at the top, and would take another base without a word."""
    old = copy_of(E00 / "target", tmp_path / "old", rope_theta=500.0)
    rope = {"rope_theta": 500.0, "rope_type": "default"}
    new = copy_of(E00 / "target", tmp_path / "new", rope_theta=None, rope_parameters=rope)
    out = convert(new, tmp_path / "out")
    tokens = mx.array([[5, 9, 40, 7]])
    want = load_model(old)[0](tokens)
    assert mx.array_equal(load_model(out)[0](tokens), want).item()
    assert not mx.allclose(load_model(new)[0](tokens), want, atol=1e-3).item()  # else this shows nothing


def test_brackets_in_names(tmp_path: Path) -> None:
    """mlx-lm takes a folder's name for a pattern of names."""
    source = copy_of(E00 / "target", tmp_path / "models [old]" / "mine [a-z]")
    same_tokens(convert(source, tmp_path / "out [new]"))


def test_python_of_a_folder_is_neither_run_nor_copied(
    with_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    marker = tmp_path / "executed"
    (with_tokenizer / "own.py").write_text(f"open({str(marker)!r}, 'w')\n")
    settings = with_tokenizer / "tokenizer_config.json"
    values = {**json.loads(settings.read_text()), "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    settings.write_text(json.dumps(values))
    out = convert(with_tokenizer, tmp_path / "out")
    assert not (out / "own.py").exists() and not marker.exists()
    capsys.readouterr()
    config = with_tokenizer / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_file": "own.py"}))
    found = error_of(capsys, "target", str(with_tokenizer), "--out", str(tmp_path / "other"))
    assert "own.py" in found and not marker.exists()


def test_what_is_converted_loads(
    with_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A damaged tokenizer is found here, and not by those who are given the folder."""
    for name, text, message in (
        ("tokenizer.json", "{}", "the tokenizer in"),
        ("tokenizer.json", "version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        ("tokenizer_config.json", "[1]", "must hold a JSON object"),
        ("generation_config.json", "{", "is not JSON"),
        ("generation_config.json", '{"eos_token_id": "x"}', "eos_token_id must be a token's id"),
        ("config.json", "version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    ):
        source = tmp_path / "damaged"
        shutil.copytree(with_tokenizer, source)
        (source / name).write_text(text)
        found = error_of(capsys, "target", str(source), "--out", str(tmp_path / "out"))
        assert message in found and str(source) in found and "/out" not in found
        shutil.rmtree(source)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["hf"]


def test_an_index_that_does_not_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = copy_of(E00 / "target", tmp_path / "hf")
    index = source / "model.safetensors.index.json"
    run = ["target", str(source), "--out", str(tmp_path / "out")]
    for where, message in (
        ({"x.weight": "model.safetensors"}, "names tensors that its shards lack: x.weight"),
        ({"x.weight": "model-00002-of-00002.safetensors"}, "shards that are missing: model-00002"),
        ({"x.weight": "../secret.safetensors"}, "points outside its folder"),
        ({"x.weight": str(tmp_path / "secret.safetensors")}, "points outside its folder"),
        ({"x.weight": ".."}, "shards that are missing"),
        ({"x.weight": ""}, "shards that are missing"),
        ({"x.weight": 5}, "shards that are missing"),
        ({}, "has no weight_map"),
        ([], "has no weight_map"),
    ):
        index.write_text(json.dumps({"weight_map": where}))
        assert message in error_of(capsys, *run)
    assert [f.name for f in tmp_path.iterdir()] == ["hf"]


def test_links_in_a_circle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = copy_of(E00 / "target", tmp_path / "hf")
    out = tmp_path / "out"
    for name in ("config.json", "model.safetensors"):
        kept = (source / name).rename(tmp_path / name)
        (source / name).symlink_to(source / name)
        assert "error: no " in error_of(capsys, "target", str(source), "--out", str(out))
        (source / name).unlink()
        kept.rename(source / name)
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    circle = str(tmp_path / "circle")
    assert "no target at" in error_of(capsys, "target", circle, "--out", str(out))
    assert f"--out {circle}" in error_of(capsys, "target", str(source), "--out", circle)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["circle", "hf"]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_bare_sentencepiece_tokenizer(kind: str, tmp_path: Path) -> None:
    """A folder as the first Llama came: PyTorch weights and `tokenizer.model`, with no `tokenizer.json`."""
    import sentencepiece

    source = copy_of(E00 / "target", tmp_path / "hf", vocab_size=320, bos_token_id=1, eos_token_id=2)
    arrays = arrays_of(source)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        arrays[name] = np.pad(arrays[name], ((0, 320 - len(arrays[name])), (0, 0)))
    (source / "model.safetensors").unlink()
    write_torch(source / "pytorch_model.bin", arrays)
    (tmp_path / "text").write_text(
        "the old mill by the river turns and turns\n" * 20 + "a café, 12 + 30 = 42\n"
    )
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(source / "tokenizer"), model_type=kind, vocab_size=320,
        byte_fallback=True, normalization_rule_name="identity", hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    out = convert(source, tmp_path / "out")
    assert (out / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()
    tokenizer = load(out, "none").tokenizer
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    assert tokenizer is not None and tokenizer.eos_token_ids == {theirs.eos_id()}
    for text in ("the river turns", "two  spaces", "日本 🎉", "42\n\nmill"):
        ids = theirs.encode(text)
        assert tokenizer.encode(text, add_special_tokens=False) == ids
        assert tokenizer.decode(ids) == theirs.decode(ids)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("gpt-oss", "MXFP4"), ("qwen3moe", "Q8_0"), ("gemma3", "Q5_0"), ("phi3-long", "F32"), ("qwen2-yarn", "BF16"),
     ("smollm3", "Q4_1"), ("mixtral", "Q5_1")],
)  # fmt: skip
def test_every_kind_of_gguf_keeps_its_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str
) -> None:
    """Packed experts, MXFP4, layers of different bits, and RoPE scalings that a config can express."""
    from mlx_lm.utils import load_model

    from tests import ggufs

    monkeypatch.setenv("REDRAFTER_CACHE", str(tmp_path / "cache"))
    ggufs.write(tmp_path / "m.gguf", name, kind=kind)
    tokens = mx.array([[5, 9, 40, 7, 8, 3, 100, 260, 17, 17, 30, 4]])
    want = load_gguf(tmp_path / "m.gguf")[0](tokens)
    got = load_model(convert(str(tmp_path / "m.gguf"), tmp_path / "out"))[0](tokens)
    assert mx.array_equal(got, want)

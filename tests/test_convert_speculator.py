"""Speculators as IBM and Snowflake publish them become folders of ours with the same logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.speculators import CASES, Arrays, make_speculator, published, reference
from tests.test_convert_torch_file import write_torch
from tests.toy import HIDDEN, VOCAB, save_folder

# isort: split
import mlx.core as mx
import numpy as np

from convert.__main__ import main
from redrafter_mlx.drafters.kinds import load_drafter
from redrafter_mlx.drafters.speculator import Speculator
from redrafter_mlx.files import named_weights
from redrafter_mlx.generation import generate
from redrafter_mlx.loading.load import load

IBM: dict[str, Any] = {
    "architectures": ["MLPSpeculatorPreTrainedModel"], "model_type": "mlp_speculator", "emb_dim": HIDDEN,
    "inner_dim": 48, "n_candidates": 5, "n_predict": 3, "top_k_tokens_per_head": [4, 3, 2],
    "torch_dtype": "float16", "transformers_version": "4.41.2", "vocab_size": VOCAB,
}  # fmt: skip
SNOWFLAKE: dict[str, Any] = {
    "architectures": ["ArcticLSTMSpeculatorPreTrainedModel"], "model_type": "mlp_speculator",
    "base_model_name_or_path": "owner/target", "input_hidden_dim": HIDDEN, "inner_dim": "48", "proj_dim": "48",
    "emb_dim": "48", "n_candidates": 3, "n_predict": 3, "scale_input": False, "tie_weights": True,
    "tie_lstm_embs": True, "method": "sum_lstm", "top_k_tokens_per_head": [1, 1, 1], "torch_dtype": "bfloat16",
    "vocab_size": VOCAB,
}  # fmt: skip


def save(folder: Path, config: dict[str, Any], tensors: Arrays) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    arrays = {name: mx.array(array) for name, array in tensors.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, metadata={"format": "pt"})
    return folder


def convert(source: Path, out: Path, *options: str) -> Speculator:
    assert main(["drafter", str(source), "--out", str(out), *options]) == 0
    drafter = load_drafter(out)
    assert isinstance(drafter, Speculator)
    return drafter


def check(found: Speculator, original: Speculator) -> None:
    """The same weights to the bit, and the logits of the published formulas."""
    assert named_weights(found).keys() == named_weights(original).keys()
    for name, array in named_weights(original).items():
        assert mx.array_equal(named_weights(found)[name], array).item(), name
    context = np.random.default_rng(0).normal(size=HIDDEN).astype(np.float32)
    want = reference(original.config, published(original), context, [5])
    state = found.begin(mx.array(context), mx.array(5))
    np.testing.assert_allclose(found.logits(state, 0), want, atol=1e-4)


def config_of(name: str) -> dict[str, Any]:
    """A published config for a case, with the keys that its publisher writes."""
    changes = CASES[name]
    return {**(SNOWFLAKE if "method" in changes else IBM), "tie_lstm_embs": False, **changes}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("prefix", ["", "speculator."])
def test_every_kind(name: str, prefix: str, tmp_path: Path) -> None:
    original = make_speculator(**CASES[name])
    tensors = {prefix + key: array for key, array in published(original).items()}
    found = convert(save(tmp_path / "in", config_of(name), tensors), tmp_path / "out")
    check(found, original)
    made_for = found.config.target
    assert made_for == ({} if "method" not in CASES[name] else {
        "name": "owner/target", "hidden_size": HIDDEN, "vocab_size": VOCAB
    })  # fmt: skip
    for field in ("n_predict", "method", "tie_weights", "tie_lstm_embs", "scale_input"):
        assert getattr(found.config, field) == getattr(original.config, field)


@pytest.mark.parametrize("name", ["mlp_tied", "lstm_tied"])
def test_tied_tensors_stored_once(name: str, tmp_path: Path) -> None:
    """safetensors keeps one name of those that share memory, and not always the first."""
    original = make_speculator(**CASES[name])
    tensors = published(original)
    kept = {key: array for key, array in tensors.items() if key not in ("proj.2.weight", "head.0.weight")}
    for key in ("emb.0.weight", "emb.2.weight", "forget_emb.0.weight", "cell_emb.0.weight", "head.2.weight"):
        kept.pop(key, None)
    assert len(kept) <= len(tensors) - 4
    check(convert(save(tmp_path / "in", config_of(name), kept), tmp_path / "out"), original)


def test_snowflakes_trainer(tmp_path: Path) -> None:
    """`pytorch_model.bin`, every tied tensor under all its names, no prefix."""
    original = make_speculator(**CASES["lstm_tied"])
    source = save(tmp_path / "in", SNOWFLAKE, {})
    (source / "model.safetensors").unlink()
    write_torch(source / "pytorch_model.bin", published(original))
    check(convert(source, tmp_path / "out"), original)
    check(convert(source / "pytorch_model.bin", tmp_path / "again"), original)


def test_shards(tmp_path: Path) -> None:
    original = make_speculator()
    tensors = {f"speculator.{name}": array for name, array in published(original).items()}
    source = save(tmp_path / "in", IBM, {})
    (source / "model.safetensors").unlink()
    names = sorted(tensors)
    where: dict[str, str] = {}
    for shard in range(3):
        file = f"model-0000{shard + 1}-of-00003.safetensors"
        part = {name: mx.array(tensors[name]) for name in names[shard::3]}
        mx.save_safetensors(str(source / file), part)
        where |= dict.fromkeys(part, file)
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    check(convert(source, tmp_path / "out"), original)


@pytest.mark.parametrize(
    "architecture", ["ArcticLSTMSpeculatorPreTrainedModel", "MLPVariantSpeculatorPreTrainedModel"]
)
def test_snowflakes_sum_rnn(architecture: str, tmp_path: Path) -> None:
    """Each layer is an `nn.Sequential` of one; sizes are text, a number, or a list of one."""
    original = make_speculator()
    tensors = {}
    for name, array in published(original).items():
        kind, stage, end = name.split(".")
        tensors[name if kind == "head" else f"{kind}.{stage}.0.{end}"] = array
    config = {**SNOWFLAKE, "architectures": [architecture], "method": "sum_rnn", "tie_weights": False}
    config |= {"inner_dim": 48, "proj_dim": "[48]", "emb_dim": [48]}
    check(convert(save(tmp_path / "in", config, tensors), tmp_path / "out"), original)
    del config["method"]
    check(convert(save(tmp_path / "in", config, tensors), tmp_path / "default"), original)


def test_inner_dim_0_is_the_hidden_size(tmp_path: Path) -> None:
    original = make_speculator(inner_size=HIDDEN)
    source = save(tmp_path / "in", {**IBM, "inner_dim": 0}, published(original))
    check(convert(source, tmp_path / "out"), original)


def test_dtype(tmp_path: Path) -> None:
    original = make_speculator(**CASES["lstm_tied"])
    tensors = {name: array.astype(np.float16) for name, array in published(original).items()}
    source = save(tmp_path / "in", SNOWFLAKE, tensors)
    for dtype, options in ((mx.float16, []), (mx.bfloat16, ["--dtype", "bfloat16"])):
        found = convert(source, tmp_path / str(dtype), *options)
        assert {array.dtype for array in named_weights(found).values()} == {dtype}


def test_with_its_target(tmp_path: Path) -> None:
    """From the published files to text, which is what the target writes alone."""
    target = save_folder(tmp_path / "target")
    vocab = json.loads((target / "config.json").read_text())["vocab_size"]
    original = make_speculator(vocab_size=vocab)
    source = save(tmp_path / "in", {**IBM, "vocab_size": vocab}, published(original))
    found = convert(source, tmp_path / "out", "--target", str(target))
    assert found.config.target == {"name": "target", "hidden_size": HIDDEN, "vocab_size": vocab}
    model = load(target, tmp_path / "out")
    _, plain = generate(model, [5, 9, 33], max_tokens=24, draft="off")
    _, stats = generate(model, [5, 9, 33], max_tokens=24, draft="4x4")
    assert stats.token_ids == plain.token_ids and stats.drafted_tokens > 0


def error_of(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """What is said of a source that cannot be converted: one line, exit code 2, and nothing left behind."""
    out = tmp_path / "out"
    assert main(["drafter", str(source), "--out", str(out), *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and not out.exists() and not list(tmp_path.glob(".out*"))
    last = captured.err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    return last


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**SNOWFLAKE, "inner_dim": "48.48"}, "inner_dim '48.48' is not supported: it must be one size"),
        ({**SNOWFLAKE, "emb_dim": [48, 48]}, "emb_dim [48, 48] is not supported"),
        ({**SNOWFLAKE, "proj_dim": "64"}, "proj_dim must be inner_dim 48, not '64'"),
        ({**SNOWFLAKE, "method": "sum_gru"}, "method 'sum_gru' is not supported, only sum_rnn and sum_lstm"),
        ({**SNOWFLAKE, "architectures": ["EagleModel"]}, "architectures 'EagleModel' is not supported, only MLPSpec"),
        ({**SNOWFLAKE, "tie_weights": False}, "tie_weights must be true where method is sum_lstm"),
        ({**IBM, "tie_weights": "yes"}, "tie_weights must be true or false, not 'yes'"),
        ({**IBM, "n_predict": "3"}, "n_predict must be an integer"),
        ({**IBM, "n_predict": 100}, "n_predict must be at most 63, not 100"),
        ({**IBM, "emb_dim": True}, "emb_dim True is not supported"),
        ({**IBM, "method": "sum_lstm"}, "lacks input_hidden_dim, proj_dim"),
        ({key: value for key, value in IBM.items() if key != "n_predict"}, "lacks n_predict"),
        ({**IBM, "emb_dim": 24}, "proj.0.weight has shape (48, 32), expected (48, 24)"),
        ({**IBM, "n_predict": 4}, "emb.3.weight (64, 48) is missing"),
        ({**IBM, "n_predict": 2}, "5 tensors have names that a speculator with method sum_rnn and n_predict 2"),
    ],
)  # fmt: skip
def test_wrong_configs(
    config: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = make_speculator(**(CASES["lstm_tied"] if config.get("input_hidden_dim") else {}))
    source = save(tmp_path / "in", config, published(original))
    said = error_of(source, tmp_path, capsys)
    assert message in said and str(source) in said


def test_wrong_tensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def message(name: str, **changes: np.ndarray | None) -> str:
        tensors = {**published(make_speculator(**CASES[name])), **changes}
        kept = {key: array for key, array in tensors.items() if array is not None}
        return error_of(save(tmp_path / "in", config_of(name), kept), tmp_path, capsys)

    matrix = np.zeros((48, 48), dtype=np.float32)
    said = message("mlp", **{"head.1.weight": None, "ln.2.bias": None})
    assert "head.1.weight (64, 48) is missing" in said and "ln.2.bias (48,) is missing" in said
    assert "(proj.0.bias)" in message("mlp", **{"proj.0.bias": matrix[0]})
    assert "(lm_head.weight)" in message("mlp", **{"lm_head.weight": matrix})
    said = message("mlp_tied", **{"proj.2.weight": matrix})
    assert "tie_weights is true in its config, but proj.1.weight and proj.2.weight differ" in said
    said = message("mlp_tied", **{"ln.1.bias": matrix[0]})
    assert "tie_weights is true in its config, but ln.0.bias and ln.1.bias differ" in said
    said = message("mlp_tied", **{"emb.1.weight": matrix[:4]})
    assert "emb.0.weight and emb.1.weight differ" in said
    said = message("lstm_tied", **{"output_emb.0.weight": np.zeros((VOCAB, 48), dtype=np.float32)})
    assert "tie_lstm_embs is true in its config, but" in said and "output_emb.0.weight differ" in said
    said = message("lstm", **{"output_emb.0.weight": None, "cell_proj.1.weight": None})
    assert "lacks cell_proj.1.weight, output_emb.0.weight" in said
    said = message("lstm", **{"input_proj.1.weight": matrix[:8]})
    assert "input_proj.1.weight" in said and "must be matrices of one shape, not (8, 48), (48, 48)" in said
    assert "head.0.weight cannot be of dtype int32" in message(
        "mlp", **{"head.0.weight": np.zeros((VOCAB, 48), dtype=np.int32)}
    )
    nan = np.full((48,), np.nan, dtype=np.float32)
    assert "cell_ln.weight holds values that are not finite" in message("lstm", **{"cell_ln.0.weight": nan})


def test_damaged_or_lacking_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save(tmp_path / "in", IBM, published(make_speculator()))
    said = error_of(source, tmp_path, capsys, "--activation", "linear")
    assert "--activation linear is for recurrent drafters" in said
    data = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(data[: len(data) // 2])
    assert "is cut short" in error_of(source, tmp_path, capsys)
    (source / "model.safetensors").write_bytes(data)
    (source / "config.json").unlink()
    assert "without its config a speculator's tensors can mean several" in error_of(source, tmp_path, capsys)
    (source / "config.json").write_text("{")
    assert "is not JSON" in error_of(source, tmp_path, capsys)
    (source / "config.json").write_text(json.dumps(IBM))
    (source / "model.safetensors").unlink()
    assert "no weights in" in error_of(source, tmp_path, capsys)


def test_another_target_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = save_folder(tmp_path / "target")
    source = save(tmp_path / "in", IBM, published(make_speculator()))
    said = error_of(source, tmp_path, capsys, "--target", str(target))
    assert f"does not fit the target: vocab_size is {VOCAB}" in said


def test_a_converted_one_is_not_converted_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save(tmp_path / "in", IBM, published(make_speculator()))
    convert(source, tmp_path / "ours")
    capsys.readouterr()
    assert "already and loads as it is" in error_of(tmp_path / "ours", tmp_path, capsys)
    with pytest.raises(ValueError, match="as it was published: `redrafter-convert drafter`"):
        load_drafter(source)
    assert main(["export", str(tmp_path / "ours"), "--out", str(tmp_path / "apple")]) == 2
    assert "is a mlp_speculator, and this takes a recurrent" in capsys.readouterr().err


def test_info(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    original = make_speculator(**CASES["lstm_scaled"])
    tensors = {f"speculator.{name}": array for name, array in published(original).items()}
    tensors["model.norm.weight"] = np.ones((HIDDEN,), dtype=np.float32)
    source = save(tmp_path / "in", config_of("lstm_scaled"), tensors)

    def lines(path: Path) -> dict[str, str]:
        capsys.readouterr()
        assert main(["info", str(path)]) == 0
        return dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())

    said = lines(source)
    assert said["kind"] == "Arctic-LSTM speculator" and said["method"] == "sum_lstm"
    assert said["drafts"] == "up to 3 tokens: beam length 4, the root counted"
    assert (said["hidden size"], said["inner size"], said["vocabulary"]) == ("32", "48", "64")
    assert said["normalizes its input"] == "yes" and said["fits"].endswith("made for owner/target")
    assert said["note 1"] == "1 tensors beside the speculator are left out"
    check(convert(source, tmp_path / "ours"), original)
    assert lines(tmp_path / "ours")["kind"] == "speculator of redrafter-mlx; loads as it is"
    assert lines(save(tmp_path / "ibm", IBM, published(make_speculator())))["kind"] == "MLP speculator"

"""Loading folders: configs of either writing give the same text; what cannot be loaded is one clear error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import redrafter_mlx as rd
from tests.toy import save_folder

# isort: split
import mlx.core as mx
import numpy as np

from redrafter_mlx.loading.load import load


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_folder(tmp_path / "model")


def change(folder: Path, *, without: tuple[str, ...] = (), **changes: Any) -> Path:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in without}))
    return folder


def text(folder: Path, **options: Any) -> list[int]:
    return rd.generate(load(folder), "hello out there", max_tokens=24, **options)[1].token_ids


def test_rope_parameters_give_the_text_of_rope_theta(folder: Path) -> None:
    base = text(folder, draft="off")
    old = text(change(folder, rope_theta=37.0), draft="off")
    new = change(
        folder, without=("rope_theta",), rope_parameters={"rope_type": "default", "rope_theta": 37.0}
    )
    assert text(new, draft="off") == text(new, draft="3x4") == old != base


def test_ends_of_the_generation_config_count(folder: Path) -> None:
    plain = text(folder, draft="off")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [plain[3], 1]}))
    assert text(folder) == plain[: plain.index(plain[3]) + 1]


def test_weights_that_are_no_numbers_are_refused(folder: Path) -> None:
    weights = mx.load(str(folder / "model.safetensors"))
    assert isinstance(weights, dict)
    weights["model.norm.weight"] = weights["model.norm.weight"] * float("nan")
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    for drafter in (None, "none"):
        with pytest.raises(ValueError, match="not finite"):
            load(folder, drafter)


def test_a_folder_of_pytorch_weights_names_the_converter(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="redrafter-convert target"):
        load(folder)


@pytest.mark.parametrize(
    ("method", "name"), [("hqq", "HQQ"), ("gptq", "GPTQ"), ("bitsandbytes", "bitsandbytes")]
)
def test_formats_that_are_not_read_are_named(folder: Path, method: str, name: str) -> None:
    with pytest.raises(ValueError, match=f"holds {name} weights"):
        load(change(folder, quantization_config={"quant_method": method}))


def test_weights_of_a_method_that_the_architecture_does_not_read(folder: Path) -> None:
    """8-bit floats with scales: some of mlx-lm's models read them, its Llama does not."""
    weights = mx.load(str(folder / "model.safetensors"))
    assert isinstance(weights, dict)
    weights["model.layers.0.mlp.up_proj.weight_scale_inv"] = mx.zeros((1, 1))
    mx.eval(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    with pytest.raises(
        ValueError, match="holds FP8 weights, which mlx-lm's llama does not read.*original weights"
    ):
        load(change(folder, quantization_config={"quant_method": "fp8", "fmt": "e4m3"}))


def test_awq_as_mlx_lm_reads_it(folder: Path) -> None:
    """AutoAWQ's layout: 8 numbers of 4 bits of neighboring outputs in a word, in the order 0, 2, 4, 6, 1, 3, 5, 7."""
    weights = mx.load(str(folder / "model.safetensors"))
    assert isinstance(weights, dict)
    rng = np.random.default_rng(0)
    dense = {name: array.astype(mx.float16) for name, array in weights.items()}
    mx.eval(dense)  # the file is written over
    packed = dict(dense)
    order, shifts = [0, 2, 4, 6, 1, 3, 5, 7], np.arange(8, dtype=np.uint32) * 4
    for name in [name for name in weights if name.endswith("_proj.weight") and "down" not in name]:
        rows, columns = weights[name].shape
        numbers, zeros = rng.integers(0, 16, (columns, rows)), rng.integers(0, 16, (columns // 32, rows))
        scales = rng.choice([0.0625, 0.125], (columns // 32, rows)).astype(
            np.float16
        )  # no product is rounded
        dense[name] = mx.array(((numbers - zeros.repeat(32, 0)) * scales.repeat(32, 0)).T.astype(np.float16))
        stem = name.removesuffix("weight")
        del packed[name]
        for part, values in (("qweight", numbers), ("qzeros", zeros)):
            words = values.reshape(len(values), -1, 8)[:, :, order].astype(np.uint32) << shifts
            packed[stem + part] = mx.array(words.sum(axis=-1, dtype=np.uint32).view(np.int32))
        packed[f"{stem}scales"] = mx.array(scales)
    mx.save_safetensors(str(folder / "model.safetensors"), dense)
    want = text(folder)
    mx.save_safetensors(str(folder / "model.safetensors"), packed)
    awq = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
    assert text(change(folder, quantization_config=awq)) == want
    for other in ({"bits": 3}, {"version": "gemv"}):
        with pytest.raises(ValueError, match="holds AWQ weights"):
            load(change(folder, quantization_config={**awq, **other}))


def test_more_layers_than_tensors(folder: Path) -> None:
    with pytest.raises(ValueError, match="num_hidden_layers is 1000000"):
        load(change(folder, num_hidden_layers=1_000_000))


def test_too_large_dequantized_is_refused_before_it_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("redrafter_mlx.loading.memory.memory_bytes", lambda: 1000)
    with pytest.raises(ValueError, match="too large for this CPU"):
        load(change(folder, quantization={"bits": 4, "group_size": 64}))


def test_a_tokenizer_cannot_run_its_folders_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "tokenizer_config.json"
    config = {**json.loads(path.read_text()), "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    path.write_text(json.dumps({**config, "tokenizer_class": "Evil"}))
    (folder / "evil.py").write_text(
        "from pathlib import Path\nPath('ran').write_text('ran')\nclass Evil: pass\n"
    )
    monkeypatch.chdir(folder)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    try:
        load(folder)
    except ValueError as error:
        assert "tokenizer" in str(error)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("name", ["no/such/folder", "./missing", "just-a-name"])
def test_a_target_that_is_not_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="no target"):
        load(name)


def test_a_file_is_no_folder(folder: Path) -> None:
    for target, drafter in ((folder / "config.json", None), (folder, folder / "config.json")):
        with pytest.raises(FileNotFoundError, match=r"no (target|drafter) at .*config\.json.*: give "):
            load(target, drafter)

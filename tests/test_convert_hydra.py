"""Hydra's heads as their authors publish them become folders of ours with the same weights and drafts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.heads import HYDRA, PREFIX, Arrays, make_hydra, published
from tests.test_convert_medusa import error_of, save
from tests.toy import HIDDEN, VOCAB, make_model, save_folder

# isort: split
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from convert.__main__ import main
from redrafter_mlx.drafters.hydra import Hydra
from redrafter_mlx.drafters.kinds import load_drafter
from redrafter_mlx.files import named_weights
from redrafter_mlx.generation import generate
from redrafter_mlx.loading.load import load

THEIRS: dict[str, Any] = {
    "base_model_name_or_path": "owner/target", "grounded_heads": True, "hidden_state_offset": 0,
    "hydra_head_arch": "mlp", "hydra_num_heads": 3, "hydra_num_layers": 1, "transformers_version": "4.31.0",
}  # fmt: skip
FILE = "hydra_lm_head.pt"


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("models") / "target")


def vocab_of(target: Path) -> int:
    return int(json.loads((target / "config.json").read_text())["vocab_size"])


def config_of(drafter: Hydra) -> dict[str, Any]:
    config = drafter.config
    return {
        **THEIRS,
        "hydra_head_arch": "prefix-mlp" if config.prefix else "mlp",
        "grounded_heads": config.grounded,
        "hydra_num_layers": config.num_layers,
    }


def unread(size: int, vocab: int) -> Arrays:
    """What a checkpoint with a prefix layer holds and nobody reads."""
    name = "prefix_embeding_layer."
    frequencies = 10000.0 ** (-2.0 * np.arange(size // 2) / size)
    return {
        f"{name}layers.0.self_attn.rotary_emb.inv_freq": frequencies.astype(np.float32),
        f"{name}embed_tokens.weight": np.ones((vocab, HIDDEN), dtype=np.float32),
    }


def convert(source: Path, out: Path, *options: str) -> Hydra:
    assert main(["drafter", str(source), "--out", str(out), *options]) == 0
    drafter = load_drafter(out)
    assert isinstance(drafter, Hydra)
    return drafter


def check(found: Hydra, original: Hydra) -> None:
    assert named_weights(found).keys() == named_weights(original).keys()
    for name, array in named_weights(original).items():
        assert mx.array_equal(named_weights(found)[name], array).item(), name
    for field in ("num_heads", "num_layers", "stored_blocks", "grounded"):
        assert getattr(found.config, field) == getattr(original.config, field), field
    if original.config.prefix is not None:
        assert found.config.prefix is not None
        for key, value in original.config.prefix.items():
            assert found.config.prefix[key] == pytest.approx(value), key


@pytest.mark.parametrize("name", HYDRA)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_every_kind(name: str, prefix: str, target: Path, tmp_path: Path) -> None:
    """From the published file to text, which is what the target writes alone."""
    vocab = vocab_of(target)
    original = make_hydra(vocab_size=vocab, **HYDRA[name])
    tensors = published(original) | (unread(8, vocab) if original.config.prefix else {})
    tensors = {prefix + key: array for key, array in tensors.items()}
    source = save(tmp_path / "in", config_of(original), tensors, FILE)
    options = ["--target", str(target)] if original.config.prefix or not prefix else []
    found = convert(source, tmp_path / "out", *options)
    check(found, original)
    assert found.config.target["name"] == ("target" if options else "owner/target")
    if prefix:
        return
    model = load(target, tmp_path / "out")
    _, plain = generate(model, [5, 9, 33], max_tokens=16, draft="off")
    _, stats = generate(model, [5, 9, 33], max_tokens=16, draft="4x4")
    assert stats.token_ids == plain.token_ids and stats.drafted_tokens > 0


def test_the_tensors_count(target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    original = make_hydra(num_layers=4, num_blocks=2)
    config = {**THEIRS, "hydra_num_heads": 5, "grounded_heads": False}
    check(convert(save(tmp_path / "in", config, published(original), FILE), tmp_path / "out"), original)
    said = capsys.readouterr().err
    for key in ("hydra_num_heads 5, the tensors hold 3", "hydra_num_layers 1, the tensors hold 4",
                "grounded_heads False, the tensors hold True"):  # fmt: skip
        assert key in said


@pytest.mark.parametrize(("base", "kept"), [(10000.0, 10000.0), (10006.0, 10000.0), (500000.0, 500000.0)])
def test_rotations_are_those_of_the_file(base: float, kept: float, target: Path, tmp_path: Path) -> None:
    """16-bit frequencies are near the target's base; where they are far from it, the file is right."""
    vocab = vocab_of(target)
    original = make_hydra(vocab_size=vocab, prefix=PREFIX)
    tensors = published(original)
    name = "prefix_embeding_layer.layers.0.self_attn.rotary_emb.inv_freq"
    tensors[name] = (base ** (-2.0 * np.arange(4) / 8)).astype(np.float32)
    source = save(tmp_path / "in", config_of(original), tensors, FILE)
    found = convert(source, tmp_path / "out", "--target", str(target))
    assert found.config.prefix is not None and found.config.prefix["rope_theta"] == pytest.approx(
        kept, rel=1e-4
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hydra_head_arch": "eagle-attn"},
            "hydra_head_arch 'eagle-attn' is not supported, only mlp and prefix-mlp",
        ),
        ({"hydra_head_arch": "cross-attn"}, "hydra_head_arch 'cross-attn' is not supported"),
        (
            {"hydra_head_arch": "prefix-mlp"},
            "lacks the prefix layer, prefix_embeding_layer.*, and hydra_head_arch",
        ),
        ({"hidden_state_offset": 1}, "hidden_state_offset 1 is not supported, only 0, the last hidden state"),
    ],
)
def test_wrong_configs(
    changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save(tmp_path / "in", {**THEIRS, **changes}, published(make_hydra()), FILE)
    said = error_of(source, tmp_path, capsys)
    assert message in said and str(source) in said


def test_wrong_tensors(target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def message(name: str, *options: str, **changes: np.ndarray | None) -> str:
        original = make_hydra(vocab_size=vocab_of(target), **HYDRA[name])
        tensors = {**published(original), **changes}
        kept = {key: array for key, array in tensors.items() if array is not None}
        return error_of(save(tmp_path / "in", config_of(original), kept, FILE), tmp_path, capsys, *options)

    small, with_target = np.zeros((4, 4), dtype=np.float32), ("--target", str(target))
    said = message("four_layers", **{"hydra_mlp.1.2.linear.bias": None, "hydra_lm_head.2.weight": small})
    assert "hydra_mlp.1.2.linear.bias (32,) is missing" in said
    assert "hydra_lm_head.2.weight has shape (4, 4), expected" in said
    said = message("one_layer", **{"hydra_mlp.2.0.res_connection.weight": small})
    assert "hydra_mlp.2.0.res_connection.weight has shape (4, 4), expected (32, 128)" in said
    assert "(hydra_mlp.0.3.bias)" in message("one_layer", **{"hydra_mlp.0.3.bias": small})
    assert "(hydra_mlp.0.2.linear.weight)" in message(
        "prefix", *with_target, **{"hydra_mlp.0.2.linear.weight": small}
    )
    layer = "prefix_embeding_layer."
    said = message(
        "prefix", *with_target, **{f"{layer}norm.weight": None, f"{layer}layers.0.mlp.up_proj.weight": small}
    )
    assert (
        f"{layer}norm.weight (32,) is missing" in said
        and "mlp.up_proj.weight has shape (4, 4), expected (40, 32)" in said
    )
    said = message(
        "prefix", *with_target, **{f"{layer}layers.0.self_attn.q_proj.weight": np.zeros((30, 32), np.float32)}
    )
    assert "has 30 queries and 16 keys, which cannot be those of the 4 heads that target has" in said
    said = message("prefix", *with_target, **{f"{layer}layers.0.self_attn.rotary_emb.inv_freq": small})
    assert "inv_freq holds no frequencies of rotations" in said
    said = message(
        "prefix", **{f"{layer}norm.weight": None, f"{layer}layers.0.self_attn.k_proj.weight": None}
    )
    assert f"lacks {layer}layers.0.self_attn.k_proj.weight, {layer}norm.weight" in said
    assert "hydra_lm_head.0.weight (260, 32) is missing" in message(
        "one_layer", **{"hydra_lm_head.0.weight": None}
    )
    assert "its names are those of 100000001 heads" in message(
        "one_layer", **{"hydra_mlp.100000000.0.linear.weight": small}
    )
    assert "those of 500 blocks in a head" in message("one_layer", **{"hydra_mlp.0.499.linear.weight": small})


def test_what_is_needed_or_refused(target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    original = make_hydra(prefix=PREFIX)
    source = save(tmp_path / "in", config_of(original), published(original), FILE)
    said = error_of(source, tmp_path, capsys)
    assert "how many heads its prefix layer has" in said and "--target is needed" in said
    said = error_of(source, tmp_path, capsys, "--target", str(target))
    assert f"does not fit the target: vocab_size is {VOCAB}" in said
    other = tmp_path / "gemma"
    other.mkdir()
    model = make_model("qwen2")
    mx.save_safetensors(str(other / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (other / "config.json").write_text(json.dumps(vars(model.args)))
    said = error_of(source, tmp_path, capsys, "--target", str(other))
    assert (
        "its prefix layer is one of a Llama like the model that it drafts for, and gemma is a qwen2" in said
    )
    (source / "config.json").unlink()
    assert "without it nobody knows which hidden state" in error_of(source, tmp_path, capsys)
    plain = save(tmp_path / "plain", THEIRS, published(make_hydra()), FILE)
    convert(plain, tmp_path / "ours")
    capsys.readouterr()
    assert "already and loads as it is" in error_of(tmp_path / "ours", tmp_path, capsys)
    assert main(["export", str(tmp_path / "ours"), "--out", str(tmp_path / "apple")]) == 2
    assert "is a hydra_heads, and this takes a recurrent" in capsys.readouterr().err


def test_info(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def lines(path: Path) -> dict[str, str]:
        capsys.readouterr()
        assert main(["info", str(path)]) == 0
        return dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())

    for name, kind, prefix in (
        ("four_layers", "Hydra heads", "no"),
        ("prefix_four_layers", "Hydra++ heads", "yes"),
    ):
        original = make_hydra(**HYDRA[name])
        said = lines(save(tmp_path / name, config_of(original), published(original), FILE))
        assert (
            said["kind"] == kind and said["prefix layer"] == prefix and said["reads drafted tokens"] == "yes"
        )
        assert said["drafts"] == "up to 3 tokens: beam length 4, the root counted"
        assert (said["hidden size"], said["vocabulary"], said["layers of a head"]) == ("32", "64", "4")
    convert(tmp_path / "four_layers", tmp_path / "ours")
    assert lines(tmp_path / "ours")["kind"] == "Hydra heads of redrafter-mlx; loads as it is"

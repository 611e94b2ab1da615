"""Model folders: damaged tokenizers and configs are one error by name, and any name of a folder is a name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import redrafter_mlx as rd
from tests.toy import save_folder

# isort: split
import mlx.core as mx

from redrafter_mlx.loading.load import load


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("made") / "model")


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    import shutil

    return shutil.copytree(made, tmp_path / "model")


def change(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}))


def tokens(folder: Path, **options: Any) -> list[int]:
    return rd.generate(load(folder, **options), "hello", max_tokens=8)[1].token_ids


@pytest.mark.parametrize("name", ["models [old]", "a*b", "what?", "[a-z]"])
def test_no_name_of_a_folder_is_a_pattern(folder: Path, name: str) -> None:
    want = tokens(folder)
    moved = folder.rename(folder.parent / name)
    assert tokens(moved) == want
    assert tokens(moved, drafter=moved / "drafter") == want


DEEP = "[" * 200_000


@pytest.mark.parametrize(
    "changes",
    [
        {"model": None}, {"model": {"type": "Own"}}, {"decoder": 5}, {"pre_tokenizer": "x"}, {"added_tokens": None},
        {"version": None}, {"truncation": "x"}, {"padding": {"a": 1}}, {"normalizer": [1]},
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "((("}, "behavior": "Isolated", "invert": False}},
        {"model": {"type": "WordLevel", "vocab": {"a": -1}, "unk_token": "a"}},
        {"model": {"type": "WordLevel", "vocab": {"a": 0.5}, "unk_token": "a"}},
    ],
)  # fmt: skip
def test_a_damaged_tokenizer_is_one_error(folder: Path, changes: dict[str, Any]) -> None:
    change(folder / "tokenizer.json", **changes)
    with pytest.raises(ValueError, match=f"the tokenizer in {folder} cannot be loaded") as error:
        load(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"eos_token": 5}, {"tool_parser_type": "own"}, {"tokenizer_class": 5}, {"chat_template_type": "own"},
        {"model_max_length": "x"},
    ],
)  # fmt: skip
def test_damaged_settings_of_a_tokenizer_are_one_error(folder: Path, changes: dict[str, Any]) -> None:
    change(folder / "tokenizer_config.json", **changes)
    with pytest.raises(ValueError, match=r"tokenizer"):
        load(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json"])
@pytest.mark.parametrize("content", [DEEP, "{", "null", "[]"])
def test_files_that_are_no_json_object(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match="tokenizer" if name.startswith("tok") else "config.json"):
        load(folder)


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json",
        "tokenizer_config.json",
        "config.json",
        "chat_template.jinja",
        "generation_config.json",
    ],
)
def test_files_that_are_not_utf8_are_named(folder: Path, name: str) -> None:
    (folder / name).write_bytes('{"caf\N{LATIN SMALL LETTER E WITH ACUTE}": 1}'.encode("latin-1"))
    with pytest.raises(ValueError, match=f"{name} is not (UTF-8|JSON).*0xe9"):
        load(folder)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "config.json", "chat_template.jinja"]
)
def test_a_byte_order_mark_is_not_text(folder: Path, name: str) -> None:
    want = tokens(folder)
    (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())
    assert tokens(folder) == want


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_pointer_of_git_lfs_is_called_so(folder: Path, name: str) -> None:
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:5e\nsize 1\n")
    with pytest.raises(ValueError, match=f"{name} is a Git LFS pointer"):
        load(folder)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("where", [".", "drafter"])
def test_the_tensor_that_is_not_finite_is_named(folder: Path, value: str, where: str) -> None:
    path = folder / where / "model.safetensors"
    weights = mx.load(str(path))
    assert isinstance(weights, dict)
    name = "model.embed_tokens.weight" if where == "." else "rnn_w.weight"
    weights[name][17, 1] = float(value)  # a row that no prompt of a check has
    mx.save_safetensors(str(path), weights)
    with pytest.raises(ValueError, match=rf"{name} holds values that are not finite"):
        load(folder)


def test_a_weight_that_float16_cannot_hold(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = mx.load(str(path))
    assert isinstance(weights, dict)
    weights["model.embed_tokens.weight"][17, 1] = 1e6
    mx.save_safetensors(str(path), weights)
    load(folder, dtype="float32")
    with pytest.raises(ValueError, match=r"in float16.*embed_tokens.weight holds values"):
        load(folder, dtype="float16")


def test_ids_beyond_the_tokenizer_say_nothing(tmp_path: Path) -> None:
    """Models pad their vocabulary: 320 rows here, 260 tokens."""
    from tests.toy import _COMMON, FAMILIES, make_model

    folder = save_folder(tmp_path / "padded")
    sizes = {"vocab_size": 320}
    model = make_model("llama", 0, **sizes)
    from mlx.utils import tree_flatten

    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (folder / "config.json").write_text(
        json.dumps({**_COMMON, **FAMILIES["llama"], **sizes, "eos_token_id": 0})
    )
    loaded = load(folder, "none")
    bias = {str(token): 100.0 for token in range(300, 320)}
    text, stats = rd.generate(loaded, "hello", max_tokens=6, sampling=rd.Sampling(logit_bias=bias))
    assert min(stats.token_ids) >= 300 and text == ""


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"eos_token_id": "two"}, "eos_token_id must be a token's id"),
        ({"eos_token_id": 1.5}, "eos_token_id must be a token's id"),
        ({"eos_token_id": [1, True]}, "eos_token_id must be a token's id"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false"),
        ({"head_dim": 10**400}, "head_dim must be an integer"),
        ({"text_config": 5}, "text_config must be an object"),
    ],
)
def test_values_of_a_config_that_cannot_be(folder: Path, changes: dict[str, Any], rule: str) -> None:
    change(folder / "config.json", **changes)
    with pytest.raises(ValueError, match=f"config.json: {rule}"):
        load(folder)


def test_a_generation_config_that_cannot_be(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": {"a": 1}}))
    with pytest.raises(ValueError, match=r"generation_config.json: eos_token_id must be"):
        load(folder)


def head_of(folder: Path) -> mx.array:
    return load(folder, drafter="none").target.output_rows()


def test_a_head_that_is_there_is_not_dropped(folder: Path) -> None:
    """transformers may leave `tie_word_embeddings` out, and mlx-lm's Llama would take the embedding for the head."""
    want = head_of(folder)
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("tie_word_embeddings") is False
    (folder / "config.json").write_text(json.dumps(config))
    assert mx.array_equal(head_of(folder), want).item()
    change(folder / "config.json", tie_word_embeddings=True)
    with pytest.raises(
        ValueError, match=r"config.json: tie_word_embeddings is true, and lm_head.weight differs"
    ):
        load(folder)
    weights = mx.load(str(folder / "model.safetensors"))
    assert isinstance(weights, dict)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    assert mx.array_equal(head_of(folder), weights["model.embed_tokens.weight"]).item()

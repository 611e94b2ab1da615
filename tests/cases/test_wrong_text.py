"""Input that gave another text than it should, without a word."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import redrafter_mlx as rd

# isort: split
import mlx.core as mx

from tests.cases.command import convert, generate, redrafter, refused
from tests.cases.gguf_file import save_gguf
from tests.cases.models import edit_config, edit_weights, random_model, vocabulary

Copy = Callable[..., Path]


def test_rope_parameters_are_read_as_rope_theta(copy: Copy, tmp_path: Path) -> None:
    """As transformers 5 writes configs; also after a conversion."""
    old, new = edit_config(copy("old"), rope_theta=500000.0), copy("new")
    edit_config(
        new, without=("rope_theta",), rope_parameters={"rope_theta": 500000.0, "rope_type": "default"}
    )
    tokens = generate(old, prompt="hello out there").tokens
    assert tokens == generate(new, prompt="hello out there").tokens
    assert convert("target", new, "--out", tmp_path / "out").code == 0
    assert tokens == generate(tmp_path / "out", prompt="hello out there").tokens
    assert tokens != generate(copy("other"), prompt="hello out there").tokens, "the case tells them apart"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_refused(copy: Copy, tmp_path: Path, value: float) -> None:
    name = "model.layers.1.mlp.down_proj.weight"

    def spoil(weights: dict[str, mx.array]) -> None:
        weights[name][0, 0] = value

    model = edit_weights(copy(), spoil)
    refused(generate(model, "--drafter", "none"), name)
    refused(generate(model), name)
    refused(convert("target", model, "--out", tmp_path / "out"), name)
    assert not (tmp_path / "out").exists()


def test_a_drafters_weights_that_are_no_numbers_are_refused(copy: Copy) -> None:
    drafter = copy() / "drafter"

    def spoil(weights: dict[str, mx.array]) -> None:
        weights[min(weights)][0] = float("nan")

    edit_weights(drafter, spoil)
    refused(generate(drafter.parent, "--draft", "2x3"), "finite")


def test_the_templates_end_of_a_turn_ends_the_answer(tmp_path: Path, successor: Path) -> None:
    """The end token is <|endoftext|>, and the chat template ends turns with <|end|>."""
    path = save_gguf(tmp_path / "x.gguf", {"tokenizer.ggml.eos_token_id": 5})
    assert generate(path, "--max-tokens", 20).line()["text"] == "abc."
    said = redrafter("chat", "--model", path, "--max-tokens", 20, "--temperature", 0, stdin=b"hi\n")
    assert said.out == "abc.\n"
    assert generate(successor, "--max-tokens", 20).line()["text"] == "abc."


def test_no_second_beginning_of_text(tmp_path: Path) -> None:
    model = random_model(tmp_path / "m", bos=True)
    assert generate(model, "--raw", prompt="<|bos|>hi").line()["stats"]["prompt_tokens"] == 3
    assert generate(model, "--raw", prompt="hi").line()["stats"]["prompt_tokens"] == 3


def test_the_first_space_is_text(successor: Path) -> None:
    given = ("--raw", "--max-tokens", 3)
    assert generate(successor, *given, prompt="ends with Q").line()["text"] == " wo"
    assert generate(successor, *given, "--stop", " w", prompt="ends with Q").line()["text"] == ""


def test_a_byte_order_mark_is_no_text(model: Path, tmp_path: Path) -> None:
    asked = redrafter("generate", "-m", model, "--max-tokens", 2, "--json", stdin=b"\xef\xbb\xbfSay hi.\r\n")
    assert asked.line()["stats"]["prompt_tokens"] == 10
    prompts = tmp_path / "p.jsonl"
    prompts.write_bytes(b'\xef\xbb\xbf{"prompt": "a river"}\r\n{"prompt": "a lake"}\r\n')
    done = redrafter("generate", "-m", model, "--max-tokens", 2, "--json", "--prompts", prompts)
    assert done.code == 0 and len(done.out.splitlines()) == 2


def test_a_byte_order_mark_in_a_config(copy: Copy) -> None:
    folder, tokens = copy(), generate(copy("plain")).tokens
    for name in ("config.json", "drafter/config.json"):
        (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())
    assert generate(folder).tokens == tokens


@pytest.mark.parametrize(
    ("line", "named"),
    [
        (
            '{"prompt": "x", "max_tokens": 2, "temperature": 0.0, "system": "Be brief.", "stop": ["."]}',
            "max_tokens",
        ),
        ('{"prompt": "x", "seed": 3}', "seed"),
        ('{"prompt": "x", "messages": [{"role": "user", "content": "y"}]}', "messages"),
        ('{"prompt": "x", "prompt": "y"}', "prompt"),
    ],
)
def test_nothing_in_a_line_of_prompts_is_ignored(model: Path, tmp_path: Path, line: str, named: str) -> None:
    (tmp_path / "p.jsonl").write_text(line)
    refused(redrafter("generate", "-m", model, "--prompts", tmp_path / "p.jsonl"), "p.jsonl:1", named)


@pytest.mark.parametrize(
    "settings",
    [
        {"logit_bias": {70: float("nan")}},
        {"presence_penalty": float("nan")},
        {"repetition_penalty": float("inf")},
        {"temperature": float("nan")},
    ],
)
def test_settings_that_are_no_numbers(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        rd.Sampling(**settings)


@pytest.mark.parametrize("bias", [{-1: 1000.0}, {10**6: 5.0}, {"seventy": 1.0}])
def test_a_bias_for_a_token_that_is_not_there(model: Path, bias: dict[Any, float]) -> None:
    loaded = rd.load(model, "none")
    with pytest.raises(ValueError, match="logit_bias"):
        rd.generate(loaded, "hi", max_tokens=4, sampling=rd.Sampling(logit_bias=bias))
    text_keys, number_keys = ({"70": -100.0}, {70: -100.0})
    found = [
        rd.generate(loaded, "hi", max_tokens=4, sampling=rd.Sampling(logit_bias=keys))[1].token_ids
        for keys in (text_keys, number_keys)
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize("options", [("--temperature", "1e-40"), ("--temperature", "1", "--top-p", "0")])
def test_extremes_of_sampling_take_the_most_probable_token(model: Path, options: tuple[str, ...]) -> None:
    assert generate(model, "--seed", 1, *options).tokens == generate(model).tokens


def test_rows_beyond_the_tokenizer_say_nothing(tmp_path: Path) -> None:
    model = random_model(tmp_path / "m", vocab_size=320)
    done = generate(model, "--max-tokens", 40, "--temperature", 5, "--seed", 3, "--draft", "2x3")
    exclamation_marks = done.tokens.count(vocabulary().index("!"))
    assert done.line()["text"].count("!") == exclamation_marks and len(set(done.tokens)) > 10


def test_messages_whose_content_is_not_text(model: Path) -> None:
    loaded = rd.load(model, "none")
    parts: Any = [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}]
    assert (
        rd.generate(loaded, parts, max_tokens=4)[1].token_ids
        == rd.generate(loaded, "hi", max_tokens=4)[1].token_ids
    )
    for content in (None, 3, [{"type": "image_url"}]):
        wrong: Any = [{"role": "user", "content": content}]
        with pytest.raises(ValueError, match="content"):
            rd.generate(loaded, wrong, max_tokens=4)


def test_one_prompt_cache_in_two_generations(model: Path) -> None:
    loaded, cache = rd.load(model, "none"), rd.PromptCache()
    first = rd.stream_generate(loaded, "one", max_tokens=8, cache=cache)
    begun = [next(first).token for _ in range(3)]
    with pytest.raises(ValueError, match="in use"):
        rd.generate(loaded, "two", max_tokens=8, cache=cache)
    whole = begun + [chunk.token for chunk in first]
    assert whole == rd.generate(loaded, "one", max_tokens=8)[1].token_ids


def test_mlx_lm_stays_as_it_was(model: Path) -> None:
    """Its gradients too, where a gate is far below 0."""
    from mlx_lm.models import llama

    before = llama.swiglu, llama.scaled_dot_product_attention
    rd.load(model)
    assert (llama.swiglu, llama.scaled_dot_product_attention) == before
    gate, x = mx.full((8, 100), -100.0), mx.ones((8, 100))
    gradient = mx.grad(lambda g: llama.swiglu(g, x).sum())(gate)
    assert bool(mx.all(mx.isfinite(gradient)).item())

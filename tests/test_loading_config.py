"""Configs as people have them: RoPE settings wherever they stand, limits, ends, and values that cannot be."""

from __future__ import annotations

from typing import Any

import pytest

import redrafter_mlx  # noqa: F401  (before mlx)

# isort: split
from redrafter_mlx.loading.config import eos_token_ids, max_length, normalize_config, turn_end

LLAMA: dict[str, Any] = {"model_type": "llama", "hidden_size": 32, "max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def normalized(**changes: Any) -> dict[str, Any]:
    return normalize_config({**LLAMA, **changes}, "config.json")


FAMILIES = ["llama", "qwen2", "phi3", "gemma", "gemma2", "olmo2", "cohere", "smollm3", "granite"]


@pytest.mark.parametrize("family", FAMILIES)
def test_rope_theta_is_found_in_rope_parameters(family: str) -> None:
    out = normalized(model_type=family, rope_parameters={"rope_type": "default", "rope_theta": 5000.0})
    assert out["rope_theta"] == 5000.0 and "rope_scaling" not in out


def test_a_scaling_is_found_in_rope_parameters() -> None:
    out = normalized(rope_parameters={**YARN, "rope_theta": 5000.0})
    assert out["rope_scaling"] == {**YARN, "type": "yarn"} and out["rope_theta"] == 5000.0


def test_settings_inside_text_config() -> None:
    inner = {"model_type": "llama", "max_position_embeddings": 128, "rope_parameters": {"rope_theta": 7.0}}
    out = normalize_config({"model_type": "mistral3", "text_config": inner}, "config.json")
    assert out["text_config"]["rope_theta"] == 7.0 and max_length(out) == 128


def test_layer_types_of_gemma3() -> None:
    given = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    out = normalized(model_type="gemma3_text", rope_parameters=given)
    assert (out["rope_theta"], out["rope_local_base_freq"]) == (1e6, 1e4)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"model_type": None}, "has no model_type"),
        (
            {"rope_theta": 10.0, "rope_parameters": {"rope_theta": 20.0}},
            "rope_theta is 10.0, and rope_parameters has 20.0",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": YARN},
            "contradict each other",
        ),
        ({"rope_scaling": {"type": "wavy"}}, "RoPE scaling 'wavy' is not known"),
        ({"rope_parameters": {"rope_type": "wavy"}}, "RoPE scaling 'wavy' is not known"),
        ({"rope_parameters": 5}, "rope_parameters must be an object"),
        ({"rope_scaling": 5}, "rope_scaling must be an object"),
        ({"rope_parameters": {"chunked": {"rope_theta": 1.0}}}, "cannot be honored"),
        ({"rope_theta": "x"}, "rope_theta must be a number greater than 1, not 'x'"),
        ({"rope_theta": 1}, "rope_theta must be a number greater than 1, not '1'"),
        ({"rms_norm_eps": 2**31}, "rms_norm_eps must be a number from 0 to 1"),
        ({"layer_norm_epsilon": True}, "layer_norm_epsilon must be a number from 0 to 1"),
        ({"norm_eps": float("nan")}, "norm_eps must be a number from 0 to 1, not 'nan'"),
        ({"hidden_size": 0}, "hidden_size must be an integer"),
        ({"vocab_size": True}, "vocab_size must be an integer"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers must be an integer"),
        ({"max_position_embeddings": "64"}, "max_position_embeddings must be a positive integer"),
        ({"max_position_embeddings": None}, "leave the key out"),
    ],
)
def test_refused_by_name(changes: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValueError, match=f"config.json.*{rule}"):
        normalized(**changes)


@pytest.mark.parametrize(
    ("scaling", "limit"),
    [
        (None, 64), (YARN, 256), ({"type": "linear", "factor": 2.0}, 128),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8}, 64),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16}, 64),
    ],
)  # fmt: skip
def test_a_stretched_context(scaling: dict[str, Any] | None, limit: int) -> None:
    assert max_length(normalized(rope_scaling=scaling)) == limit


def test_no_limit_known() -> None:
    assert max_length({"model_type": "llama"}) is None


def test_all_ends_count() -> None:
    assert eos_token_ids({"eos_token_id": 3}, {"eos_token_id": [4, 5]}, {"text_config": {"eos_token_id": 6}}, {}) == {
        3, 4, 5, 6,
    }  # fmt: skip


class Words:
    """A tokenizer of words, of which those in brackets were added as tokens of their own."""

    has_chat_template = True
    vocabulary = ("<end>", "<user>", "hi", "\n")
    added_tokens_decoder = {0: "<end>", 1: "<user>"}  # noqa: RUF012

    def __init__(self, template: str) -> None:
        self.template = template

    def apply_chat_template(self, messages: list[dict[str, str]], **options: object) -> str:
        return self.template.format(messages[-1]["content"])

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [self.vocabulary.index(word) for word in text.split(" ")]


@pytest.mark.parametrize(
    ("template", "end"), [("<user> {}<end>", 0), ("{} hi", None), ("{}", None), ("{0} <end>", 0)]
)
def test_the_token_that_ends_a_turn(template: str, end: int | None) -> None:
    assert turn_end(Words(template)) == end

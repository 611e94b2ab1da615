"""Tokenizers out of a GGUF: rules that cut text, SentencePiece, special tokens, ends, and damage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import redrafter_mlx  # noqa: F401  (before mlx)

# isort: split
from redrafter_mlx.loading.gguf.pretokenizers import RULES, pre_tokenizer
from redrafter_mlx.loading.gguf.tokenizer import load_tokenizer

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


def words(rule: str, text: str) -> list[str]:
    """What a rule cuts text into, spelled as text again."""
    from tokenizers import decoders

    decoder = decoders.ByteLevel()
    return [decoder.decode([piece]) for piece, _ in pre_tokenizer(RULES[rule]).pre_tokenize_str(text)]


TEXT = "I'll pay 1234 now,\n\n  don'T!"


@pytest.mark.parametrize(
    ("rule", "cut"),
    [
        ("gpt-2", ["I", "'ll", " pay", " 1234", " now", ",", "\n\n ", " don", "'", "T", "!"]),
        ("smollm", ["I", "'ll", " pay", " ", "1", "2", "3", "4", " now", ",", "\n\n ", " don", "'", "T", "!"]),
        ("llama-bpe", ["I", "'ll", " pay", " ", "123", "4", " now", ",\n\n", " ", " don", "'T", "!"]),
        ("qwen2", ["I", "'ll", " pay", " ", "1", "2", "3", "4", " now", ",\n\n", " ", " don", "'T", "!"]),
        ("gpt-4o", ["I'll", " pay", " ", "123", "4", " now", ",\n\n", " ", " don'T", "!"]),
        ("tekken", ["I", "'ll", " pay", " ", "1", "2", "3", "4", " now", ",\n\n", " ", " don", "'T", "!"]),
        ("deepseek-coder", ["I", "'", "ll", " pay", " ", "1", "2", "3", "4", " now", ",", "\n", "\n", " ", " don", "'",
                            "T", "!"]),
        ("deepseek-llm", ["I", "'", "ll", " pay", " ", "1234", " now", ",", "\n", "\n", " ", " don", "'", "T", "!"]),
        ("deepseek-v3", ["I", "'ll", " pay", " ", "123", "4", " now", ",\n\n", " ", " don", "'T", "!"]),
    ],
)  # fmt: skip
def test_how_rules_cut(rule: str, cut: list[str]) -> None:
    assert words(rule, TEXT) == cut


@pytest.mark.parametrize("rule", RULES)
def test_no_rule_loses_text(rule: str) -> None:
    text = "Überall 12345 ½ naïve ALLCAPS camelCase 日本語テキスト 한국어 \t\n\r\n  🙂👨‍👩‍👧 שלום\u00a0\u3000x() {}\n"
    assert "".join(words(rule, text)) == text


def test_capitals_begin_words_where_the_rule_knows_cases() -> None:
    assert words("tekken", "ÉtéCamelCASE") == ["Été", "Camel", "CASE"]
    assert words("qwen2", "ÉtéCamelCASE") == ["ÉtéCamelCASE"]


LETTERS = ["<|end|>", "<|im_end|>", "<tool>", "<|bos|>", *map(chr, range(33, 127)), "Ġ", "th", "the"]


def byte_level(**changes: Any) -> dict[str, Any]:
    types = [3, 3, 4, 3] + [1] * (len(LETTERS) - 4)
    meta = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": LETTERS,
        "tokenizer.ggml.token_type": types, "tokenizer.ggml.merges": ["t h"], "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.bos_token_id": 3,
    }  # fmt: skip
    return {**meta, **{f"tokenizer.ggml.{key}": value for key, value in changes.items()}}


def pieces(meta: dict[str, Any], text: str, **options: Any) -> list[str]:
    tokenizer = load_tokenizer(meta, Path("m.gguf"))
    return tokenizer.convert_ids_to_tokens(tokenizer.encode(text, **options))


def test_tokens_that_a_user_types() -> None:
    """A control token is no text; one of a user's own is, and is never cut."""
    meta = byte_level()
    assert pieces(meta, "a<|end|>b<tool>") == ["a", "<|end|>", "b", "<tool>"]
    tokenizer = load_tokenizer(meta, Path("m.gguf"))
    ids = tokenizer.encode("a<|end|>b<tool>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab<tool>"


def test_all_ends_count() -> None:
    found = load_tokenizer(byte_level(eot_token_id=5, eom_token_id=6), Path("m.gguf")).eos_token_ids
    assert found == {0, 5, 6, 1}, "the last: <|im_end|> ends a turn wherever it is a control token"


@pytest.mark.parametrize(
    ("pre", "given", "begins"),
    [("gpt-2", None, False), ("llama-bpe", None, True), ("llama-bpe", False, False), ("gpt-2", True, True)],
)
def test_where_a_text_begins_with_bos(pre: str, given: bool | None, begins: bool) -> None:
    changes = {"pre": pre, **({} if given is None else {"add_bos_token": given})}
    assert (pieces(byte_level(**changes), "a")[0] == "<|bos|>") == begins


def test_a_word_that_is_a_token_is_taken_whole() -> None:
    """'the' has no merge of its own here."""
    assert pieces(byte_level(), "the") == ["th", "e"]
    assert pieces(byte_level(pre="tekken"), "the") == ["the"]


def sentencepiece(**changes: Any) -> dict[str, Any]:
    """Scores say that 'ab' comes before 'bc', and a space before all."""
    made = {"ab": -3.0, "bc": -4.0, "abc": -6.0, f"{SPACE}a": -2.0, f"{SPACE}{SPACE}": -1.0}
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *"abc", SPACE, *made, "\n\n"]
    types = [2, 3, 3] + [6] * 256 + [1] * (4 + len(made)) + [4]
    meta = {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": [0.0] * 259 + [-20.0] * 4 + [*made.values(), 0.0], "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0, "tokenizer.ggml.add_bos_token": False,
    }  # fmt: skip
    return {**meta, **{f"tokenizer.ggml.{key}": value for key, value in changes.items()}}


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("abc", [f"{SPACE}a", "bc"]),
        ("babc", [SPACE, "b", "abc"]),
        ("  a", [f"{SPACE}{SPACE}", f"{SPACE}a"]),
        ("é", [SPACE, "<0xC3>", "<0xA9>"]),
        ("b\n\nb", [SPACE, "b", "\n\n", SPACE, "b"]),
        ("b</s>a", [SPACE, "b", "</s>", f"{SPACE}a"]),
    ],
)
def test_sentencepiece_merges_the_highest_score_first(text: str, cut: list[str]) -> None:
    assert pieces(sentencepiece(), text) == cut
    tokenizer = load_tokenizer(sentencepiece(), Path("m.gguf"))
    if "</s>" not in text and "\n" not in text:
        assert tokenizer.decode(tokenizer.encode(text)) == f" {text}"


def test_sentencepiece_without_the_leading_space() -> None:
    assert pieces(sentencepiece(add_space_prefix=False), "abc") == ["abc"]


@pytest.mark.parametrize(
    ("meta", "said"),
    [
        (byte_level(model="bert"), "tokenizer 'bert'"),
        (byte_level(pre="wavy"), "rule 'wavy'; known rules: codeshell, command-r"),
        (byte_level(merges=["q z"]), "needs tokens that there are not"),
        (byte_level(merges=["q"]), "needs tokens that there are not"),
        (sentencepiece(unknown_token_id=10**6), "unknown_token_id is 1000000"),
    ],
)
def test_damage_is_named(meta: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"m.gguf.*{said}"):
        load_tokenizer(meta, Path("m.gguf"))

"""A tokenizer, its special tokens and its chat template, rebuilt from a GGUF's metadata."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import (
    BPEStreamingDetokenizer,
    SPMStreamingDetokenizer,
    TokenizerWrapper,
)


def load_tokenizer(meta: dict[str, Any], path: Path) -> TokenizerWrapper:
    """Tokenizer, special tokens and chat template as the metadata gives them."""
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerFast

    kind = meta.get("tokenizer.ggml.model")
    tokens: list[str] = meta.get("tokenizer.ggml.tokens", [])
    types: list[int] = meta.get("tokenizer.ggml.token_type", [1] * len(tokens))
    if kind == "gpt2":
        tokenizer = _byte_level_bpe(meta, tokens, path)
    elif kind == "llama":
        tokenizer = _sentencepiece_bpe(meta, tokens, types)
    else:
        raise ValueError(f"{path} has tokenizer {kind!r}; 'gpt2' (BPE) and 'llama' can be loaded")
    assert isinstance(tokenizer, Tokenizer)
    control = [token for token, type_ in zip(tokens, types, strict=True) if type_ in (3, 4)]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])

    def token(name: str) -> str | None:
        index = meta.get(f"tokenizer.ggml.{name}_token_id")
        return tokens[index] if index is not None and index < len(tokens) else None

    bos = token("bos")
    if bos and meta.get("tokenizer.ggml.add_bos_token", kind == "llama"):
        from tokenizers.processors import TemplateProcessing

        tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokens.index(bos))]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=token("eos"),
        unk_token=token("unknown"),
        pad_token=token("padding"),
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = meta.get("tokenizer.chat_template")
    ends = [meta.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    detokenizer = BPEStreamingDetokenizer if kind == "gpt2" else SPMStreamingDetokenizer
    return TokenizerWrapper(fast, detokenizer, eos_token_ids=[e for e in ends if e is not None])


def _byte_level_bpe(meta: dict[str, Any], tokens: list[str], path: Path) -> object:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    llama3 = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{%s}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )

    def split(pattern: str) -> list[Any]:
        return [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]

    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    rules: dict[str, list[Any]] = {
        "default": [gpt2],
        "gpt-2": [gpt2],
        "smollm": [pre_tokenizers.Digits(individual_digits=True), gpt2],
        "llama-bpe": split(llama3 % "1,3"),
        "llama3": split(llama3 % "1,3"),
        "qwen2": split(llama3 % "1"),
    }
    pre = meta.get("tokenizer.ggml.pre", "default")
    if pre not in rules:
        known = ", ".join(sorted(rules))
        raise ValueError(f"{path} splits text by the rule {pre!r}; known rules: {known}")
    merges = [tuple(merge.split(" ", 1)) for merge in meta.get("tokenizer.ggml.merges", [])]
    vocab = {token: index for index, token in enumerate(tokens)}
    for merge in merges:
        missing = next((part for part in (*merge, "".join(merge)) if part not in vocab), None)
        if len(merge) != 2 or missing is not None:
            raise ValueError(f"{path}: the merge {' '.join(merge)!r} needs tokens that there are not")
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre.startswith("llama")))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(rules[pre])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece_bpe(meta: dict[str, Any], tokens: list[str], types: list[int]) -> object:
    """SentencePiece BPE: a merge's rank is the score of the token it makes."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers.convert_slow_tokenizer import generate_merges

    vocab = {token: index for index, token in enumerate(tokens)}
    scores = dict(zip(tokens, meta.get("tokenizer.ggml.scores", [0.0] * len(tokens)), strict=True))
    skip = [token for token, type_ in zip(tokens, types, strict=True) if type_ != 1]
    merges = generate_merges(vocab, scores, skip)
    unknown = tokens[meta.get("tokenizer.ggml.unknown_token_id", 0)]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    space: Any = normalizers.Replace(" ", "▁")
    if meta.get("tokenizer.ggml.add_space_prefix", True):
        space = normalizers.Sequence([normalizers.Prepend("▁"), space])
    tokenizer.normalizer = space
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer

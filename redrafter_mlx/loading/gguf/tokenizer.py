"""A tokenizer, its special tokens and its chat template, rebuilt from a GGUF's metadata."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import (
    BPEStreamingDetokenizer,
    SPMStreamingDetokenizer,
    TokenizerWrapper,
)

from .pretokenizers import RULES, pre_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
"""Types of tokens (`llama_token_type`). Control tokens are no text; a user's own are, and never cut."""

ENDS = ("<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>")
"""Control tokens that end a text or a turn in every model that has them."""

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""What stands for a space in the tokens of SentencePiece"""


def load_tokenizer(meta: dict[str, Any], path: Path) -> TokenizerWrapper:
    """Tokenizer, special tokens and chat template as the metadata gives them.

    Raises:
        ValueError: it is of a kind, or cuts text by a rule, that is not known; or is damaged.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    kind = meta.get("tokenizer.ggml.model")
    tokens: list[str] = meta.get("tokenizer.ggml.tokens", [])
    types: list[int] = meta.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    if kind == "gpt2":
        tokenizer = _byte_level_bpe(meta, tokens, path)
    elif kind == "llama":
        tokenizer = _sentencepiece_bpe(meta, tokens, types, path)
    else:
        raise ValueError(f"{path} has tokenizer {kind!r}; 'gpt2' (BPE) and 'llama' can be loaded")
    assert isinstance(tokenizer, Tokenizer)
    _add_special(tokenizer, tokens, types)

    def token(name: str) -> str | None:
        index = meta.get(f"tokenizer.ggml.{name}_token_id")
        return tokens[index] if index is not None and 0 <= index < len(tokens) else None

    bos = token("bos")
    if bos and meta.get("tokenizer.ggml.add_bos_token", _begins(meta)):
        from tokenizers.processors import TemplateProcessing

        tokenizer.post_processor = TemplateProcessing(
            single=[bos, "$A"],
            special_tokens=[(bos, tokens.index(bos))],
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
    named = (meta.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    ends = {int(index) for index in named if index is not None}
    ends |= {
        number
        for number, text in enumerate(tokens)
        if text in ENDS and types[number] in (CONTROL, USER_DEFINED)
    }
    detokenizer = BPEStreamingDetokenizer if kind == "gpt2" else SPMStreamingDetokenizer
    return TokenizerWrapper(fast, detokenizer, eos_token_ids=sorted(ends))


def _begins(meta: dict[str, Any]) -> bool:
    """Whether a text begins with the BOS token where the file does not say."""
    if meta.get("tokenizer.ggml.model") == "llama":
        return True
    rule = RULES.get(meta.get("tokenizer.ggml.pre", "default"))
    return rule is not None and rule.begins


def _add_special(tokenizer: Any, tokens: list[str], types: list[int]) -> None:
    """Have control tokens and a user's own found in text as they are, before it is cut."""
    from tokenizers import AddedToken

    def added(*kinds: int) -> list[Any]:
        special = USER_DEFINED not in kinds
        found = (text for text, kind in zip(tokens, types, strict=True) if kind in kinds and text)
        return [AddedToken(text, special=special, normalized=False) for text in found]

    tokenizer.add_special_tokens(added(UNKNOWN, CONTROL))
    tokenizer.add_tokens(added(USER_DEFINED))


def _byte_level_bpe(meta: dict[str, Any], tokens: list[str], path: Path) -> object:
    from tokenizers import Tokenizer, decoders, models

    name = meta.get("tokenizer.ggml.pre", "default")
    rule = RULES.get(name)
    if rule is None:
        raise ValueError(f"{path} splits text by the rule {name!r}; known rules: {', '.join(sorted(RULES))}")
    merges = [tuple(merge.split(" ", 1)) for merge in meta.get("tokenizer.ggml.merges", [])]
    vocab = {token: index for index, token in enumerate(tokens)}
    for merge in merges:
        missing = next((part for part in (*merge, "".join(merge)) if part not in vocab), None)
        if len(merge) != 2 or missing is not None:
            raise ValueError(f"{path}: the merge {' '.join(merge)!r} needs tokens that there are not")
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=rule.whole_words))
    tokenizer.pre_tokenizer = pre_tokenizer(rule)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece_bpe(meta: dict[str, Any], tokens: list[str], types: list[int], path: Path) -> object:
    """SentencePiece BPE: of all neighbors that make a token, those whose token scores highest are merged first."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    unknown_id = meta.get("tokenizer.ggml.unknown_token_id", 0)
    if not 0 <= unknown_id < len(tokens):
        raise ValueError(
            f"{path}: tokenizer.ggml.unknown_token_id is {unknown_id}, and there are {len(tokens)} tokens"
        )
    vocab = {token: index for index, token in enumerate(tokens)}
    scores = meta.get("tokenizer.ggml.scores", [0.0] * len(tokens))
    merges = _merges(vocab, scores, types)
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token=tokens[unknown_id], fuse_unk=True, byte_fallback=True)
    )
    space: Any = normalizers.Replace(" ", SPACE)
    if meta.get("tokenizer.ggml.add_space_prefix", True):
        space = normalizers.Sequence([normalizers.Prepend(SPACE), space])
    tokenizer.normalizer = space
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


def _merges(vocab: dict[str, int], scores: list[float], types: list[int]) -> list[tuple[str, str]]:
    """All pairs of tokens that make a normal token, the highest score of what they make first."""
    ranked = sorted(
        (index for index in vocab.values() if types[index] == NORMAL),
        key=lambda index: (-scores[index], index),
    )
    texts = {index: text for text, index in vocab.items()}
    merges = []
    for index in ranked:
        text = texts[index]
        cuts = ((text[:place], text[place:]) for place in range(1, len(text)))
        merges += [(left, right) for left, right in cuts if left in vocab and right in vocab]
    return merges

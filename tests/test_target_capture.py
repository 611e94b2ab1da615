"""The parts of a model are found by what they do, whatever they are called and wherever they are."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.families import build
from benchmarks.family_sizes import VOCAB

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np

from redrafter_mlx.target import Target
from redrafter_mlx.target.capture import find_parts
from redrafter_mlx.tree import chain

TOKENS = mx.array([5, 9, 33, 2], dtype=mx.int32)

PLACES: dict[str, tuple[Callable[[nn.Module], nn.Module], Callable[[nn.Module], nn.Module | None]]] = {
    "llama": (lambda m: m.model.embed_tokens, lambda m: m.lm_head),
    "internlm2": (lambda m: m.model.tok_embeddings, lambda m: m.output),
    "gpt_neox": (lambda m: m.model.embed_in, lambda m: m.model.embed_out),
    "openelm": (lambda m: m.transformer.token_embeddings, lambda m: None),
    "lille-130m": (lambda m: m.transformer.tok_embeddings, lambda m: None),
    "phixtral": (lambda m: m.transformer.embd.wte, lambda m: m.lm_head.linear),
    "gemma3n": (lambda m: m.model.language_model.embed_tokens, lambda m: None),
    "muse_spark": (lambda m: m.model.language_model.embed_tokens, lambda m: m.lm_head),
    "gptj": (lambda m: m.model.wte, lambda m: m.lm_head),
    "iquestloopcoder": (lambda m: m.model.embed_tokens, lambda m: m.lm_head),
    "mamba2": (lambda m: m.backbone.embeddings, lambda m: m.lm_head),
    "longcat_flash_ngram": (lambda m: m.model.ngram_embeddings.word_embeddings, lambda m: m.lm_head),
    "qwen3_5": (lambda m: m.language_model.model.embed_tokens, lambda m: m.language_model.lm_head),
}


@pytest.mark.parametrize("family", PLACES)
def test_embedding_head_and_the_hidden_state_between(family: str) -> None:
    model = build(family)
    classes = [type(module) for module in model.modules()]
    parts = find_parts(model)
    assert [type(module) for module in model.modules()] == classes, "nothing stays attached"
    embedding, head = (find(model) for find in PLACES[family])
    assert parts.embedding is embedding and parts.head is head and parts.is_tied == (head is None)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "lille-130m", "internlm2", "phixtral", "qwen3_5"])
def test_the_head_multiplies_the_context(family: str) -> None:
    target = Target(build(family), family)
    verified = target.verify(chain(TOKENS), target.new_cache())
    head = target._head
    bias = 0 if head is None else head.get("bias", 0)
    got = verified.contexts @ target.output_rows().T + bias
    np.testing.assert_allclose(np.array(got), np.array(verified.logits), atol=2e-3)


@pytest.mark.parametrize("family", ["llama", "phi", "stablelm", "gemma3n", "afm7", "lfm2"])
def test_contexts_for_training_are_those_of_decoding(family: str) -> None:
    """Also where a model needs a cache, or computes something else without one."""
    target = Target(build(family), family)
    want = target.verify(chain(TOKENS), target.new_cache()).contexts
    got = target.contexts(mx.stack([TOKENS, TOKENS + 1]))
    assert got.shape == (2, *want.shape)
    np.testing.assert_allclose(np.array(got[0]), np.array(want), atol=2e-3)


def test_a_head_that_is_no_layer_has_no_rows() -> None:
    """Talkie multiplies with a parameter, and scales it."""
    target = Target(build("talkie"), "talkie")
    assert target.has_own_head and target.vocab_size == VOCAB
    for rows in (target.output_rows, target.quantized_rows):
        with pytest.raises(
            ValueError, match=r"talkie \(mlx_lm.models.talkie\) has no output head whose rows"
        ):
            rows()


class Strange(nn.Module):
    """A model without what the others have."""

    def __init__(self, embeds: bool) -> None:
        super().__init__()
        self.layers = [nn.Linear(4, 4)]
        if embeds:
            self.table = nn.Embedding(8, 4)

    def __call__(self, tokens: mx.array, cache: object = None) -> mx.array:
        if "table" in self:
            raise ValueError("[matmul] something of mlx\nand a second line")
        return self.layers[0](mx.zeros((*tokens.shape, 4)))


@pytest.mark.parametrize(
    ("embeds", "message"),
    [
        (False, "test_target_capture has no input embedding that could be found$"),
        (True, r"test_target_capture does not run a forward of 6 tokens: \[matmul\] something of mlx$"),
    ],
)
def test_what_is_no_language_model_is_refused(embeds: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Target(Strange(embeds), "strange")


def test_a_family_with_a_cache_of_its_own_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="layer 0 of mlx_lm.models.deepseek_v41 keeps a LayerCache"):
        Target(build("deepseek_v41"), "deepseek")


def test_a_layer_that_is_never_called_cannot_be_watched() -> None:
    """IQuest's loop coder calls what is in its layers, not the layers."""
    target = Target(build("iquestloopcoder"), "iquest")
    target.watch((1,))
    with pytest.raises(ValueError, match=r"iquest \(.*\) does not run its layer 1 as a module"):
        target.extend(TOKENS, target.new_cache())

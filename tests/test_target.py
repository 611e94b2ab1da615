"""Any mlx-lm model as a target: trees are verified, layers watched, scale and rows of its embedding found."""

from __future__ import annotations

import math

import pytest

from tests.toy import FAMILIES, HIDDEN, VOCAB, make_model, make_target

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np

from redrafter_mlx.target import Target
from redrafter_mlx.target.capture import PROBE_TOKENS
from redrafter_mlx.target.rope import TreeRope
from redrafter_mlx.tree import chain

TOKENS = mx.array([5, 9, 33, 2], dtype=mx.int32)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_model_alone(family: str) -> None:
    want = make_model(family)(TOKENS[None])[0]
    target = make_target(family)
    got = target.verify(chain(TOKENS), target.new_cache())
    np.testing.assert_allclose(np.array(got.logits), np.array(want), rtol=1e-3, atol=1e-3)
    assert got.contexts.shape == (4, HIDDEN) and target.vocab_size == VOCAB
    last = target.extend(TOKENS, target.new_cache())
    np.testing.assert_allclose(np.array(last.logits), np.array(want[-1:]), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(np.array(last.contexts), np.array(got.contexts[-1:]), rtol=1e-3, atol=1e-3)


def test_the_context_is_what_the_head_multiplies() -> None:
    target = make_target()
    verified = target.verify(chain(TOKENS), target.new_cache())
    got = verified.contexts @ target.output_rows().T
    np.testing.assert_allclose(np.array(got), np.array(verified.logits), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(
        np.array(target.contexts(TOKENS[None])[0]), np.array(verified.contexts), rtol=1e-3, atol=1e-3
    )


def test_watching_and_not_watching_wraps_a_layer_once() -> None:
    target = make_target()
    layers = target.model.layers
    plain = type(layers[1])
    for watched in ((0, 2), (), (0, 2), (2, 0)):
        target.watch(watched)
        assert target.context_layers == watched
        verified = target.verify(chain(TOKENS), target.new_cache())
        assert verified.contexts.shape == (4, HIDDEN * (1 + len(watched)))
    for index in (0, 2):
        assert type(layers[index]).__mro__[1:] == plain.__mro__, "one class above the model's own"
    assert type(layers[1]) is plain


def test_the_order_of_the_watched_layers_is_that_of_the_context() -> None:
    target = make_target()
    parts = {}
    for watched in ((0, 2), (2, 0)):
        target.watch(watched)
        contexts = target.verify(chain(TOKENS), target.new_cache()).contexts
        parts[watched] = [np.array(part) for part in mx.split(contexts, 3, axis=-1)]
    first, second = parts[(0, 2)], parts[(2, 0)]
    for mine, theirs in zip(first, (second[0], second[2], second[1]), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert not np.allclose(first[1], first[2])
    np.testing.assert_allclose((first[1] ** 2).mean(axis=-1), 1, atol=1e-2)  # RMS-normalized


@pytest.mark.parametrize("layer", [3, -1])
def test_a_layer_that_there_is_not(layer: int) -> None:
    with pytest.raises(ValueError, match=rf"context_layers must lie in 0\.\.2, .* not {layer}$"):
        make_target().watch((0, layer))


@pytest.mark.parametrize(
    ("family", "scale"),
    [("llama", 1), ("granite", 3), ("gemma", math.sqrt(HIDDEN)), ("gemma3", math.sqrt(HIDDEN))],
)
@pytest.mark.parametrize("zero_rows", [(), (1,), PROBE_TOKENS[:-1]])
def test_the_scale_of_the_embedding(family: str, scale: float, zero_rows: tuple[int, ...]) -> None:
    """Also where some rows are zero, as those of padding tokens are."""
    model = make_model(family)
    weight = np.array(model.model.embed_tokens.weight)
    weight[list(zero_rows)] = 0
    model.model.embed_tokens.weight = mx.array(weight)
    target = Target(model, "tiny")
    assert target.embedding_scale == pytest.approx(scale, rel=2e-3)
    np.testing.assert_allclose(
        np.array(target.embed(TOKENS)), target.embedding_scale * weight[TOKENS.tolist()], rtol=1e-5
    )


def test_an_embedding_of_zeros_is_refused() -> None:
    model = make_model()
    model.model.embed_tokens.weight = mx.zeros((VOCAB, HIDDEN))
    with pytest.raises(ValueError, match="are zero or not finite .*damaged weights"):
        Target(model, "tiny")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["embedding", "layer", "head"])
def test_weights_that_are_not_finite_are_refused(value: float, where: str) -> None:
    model = make_model()
    owner = {
        "embedding": model.model.embed_tokens, "layer": model.layers[1].mlp.down_proj, "head": model.lm_head,
    }[where]  # fmt: skip
    owner.weight[:] = value
    with pytest.raises(ValueError, match="not finite.*damaged"):
        Target(model, "tiny")


@pytest.mark.parametrize("family", ["llama", "gemma"])
@pytest.mark.parametrize("bits", [None, 4])
def test_rows_of_the_output_embedding(family: str, bits: int | None) -> None:
    model = make_model(family)
    if bits is not None:
        nn.quantize(model, group_size=32, bits=bits, class_predicate=lambda _, m: m.get("weight") is not None
                    and m.weight.shape[-1] % 32 == 0 and hasattr(m, "to_quantized"))  # fmt: skip
    target = Target(model, "tiny")
    assert target.has_own_head == (family == "llama")
    verified = target.verify(chain(TOKENS), target.new_cache())
    some = mx.array([60, 3, 3], dtype=mx.int32)
    for tokens, want in ((None, verified.logits), (some, verified.logits[:, some])):
        rows = target.output_rows(tokens)
        np.testing.assert_allclose(np.array(verified.contexts @ rows.T), np.array(want), rtol=1e-4, atol=1e-3)
        quantized = target.quantized_rows(tokens)
        assert (quantized is None) == (bits is None)
        if quantized is not None:
            assert mx.array_equal(quantized.dense(), rows) and quantized.nbytes < rows.nbytes / 3
            np.testing.assert_allclose(
                np.array(quantized(verified.contexts)), np.array(want), rtol=1e-4, atol=1e-3
            )


def test_a_second_target_of_a_model_does_not_wrap_its_ropes_again() -> None:
    first = make_target()
    want = first.verify(chain(TOKENS), first.new_cache()).logits
    second = Target(first.model, "again")
    for layer in first.model.layers:
        assert isinstance(layer.self_attn.rope, TreeRope)
        assert not isinstance(layer.self_attn.rope.inner, TreeRope)
    assert mx.array_equal(second.verify(chain(TOKENS), second.new_cache()).logits, want)

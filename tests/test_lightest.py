"""Fewer bits for a drafter where a GPU is faster with them. Times are made up."""

from __future__ import annotations

import pytest

from tests.toy import make, make_drafter, make_model

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np

from redrafter_mlx import lightest as module
from redrafter_mlx.drafter import Rows, full_head, quantize_drafter, with_config
from redrafter_mlx.few_rows import Product
from redrafter_mlx.generation import Model, generate
from redrafter_mlx.lightest import lightest
from redrafter_mlx.target import PackedRows, Target


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Model:
    """As if on a GPU."""
    monkeypatch.setattr(module, "on_gpu", lambda: True)
    monkeypatch.setattr(module, "GROUP_SIZE", 32)
    return make("llama")


@pytest.mark.parametrize(
    ("seconds", "bits"),
    [
        ({0: 1.0, 8: 0.97, 4: 0.96}, 0),
        ({0: 1.0, 8: 0.9, 4: 0.88}, 8),
        ({0: 1.0, 8: 0.7, 4: 0.5}, 4),
        ({0: 1.0, 8: 1.2, 4: 0.9}, 4),
    ],
)
def test_fewer_bits_have_to_be_faster(
    model: Model, monkeypatch: pytest.MonkeyPatch, seconds: dict[int, float], bits: int
) -> None:
    monkeypatch.setattr(module, "_search_seconds", lambda choices, target: seconds)
    assert model.drafter is not None
    chosen = lightest(model.drafter, model.target)
    if not bits:
        assert chosen is model.drafter
        return
    assert chosen.config.quantization == {"bits": bits, "group_size": 32}
    assert isinstance(chosen.lm_head[0].linear, nn.QuantizedLinear) and chosen.lm_head[0].linear.bits == bits
    assert not isinstance(model.drafter.lm_head[0].linear, nn.QuantizedLinear), "the one given stays"
    hidden, tokens = mx.random.normal((1, 32), key=mx.random.key(0)), mx.array([[1, 2, 3]])
    want = model.drafter.logits(hidden, tokens, model.target.embed)
    got = chosen.logits(hidden, tokens, model.target.embed)
    assert float(mx.abs(got - want).max()) < (0.05 if bits == 8 else 0.5) * float(want.std())


def test_what_is_emitted_stays(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_search_seconds", lambda choices, target: {0: 1.0, 8: 0.9, 4: 0.5})
    _, plain = generate(model, [1, 2, 3], max_tokens=40, draft="off")
    assert model.drafter is not None
    model.drafter = lightest(model.drafter, model.target).settle()
    _, drafted = generate(model, [1, 2, 3], max_tokens=40, draft="3x4@8")
    assert drafted.token_ids == plain.token_ids


def test_a_drafter_stored_in_few_bits_stays_as_it_is(model: Model) -> None:
    drafter = make_drafter(model.target)
    quantize_drafter(drafter, 8, 32)
    with_config(drafter, quantization={"bits": 8, "group_size": 32})
    assert lightest(drafter, model.target) is drafter


def test_searches_are_timed_in_turn(model: Model) -> None:
    assert model.drafter is not None
    times = module._search_seconds({0: model.drafter, 8: make_drafter(model.target)}, model.target)
    assert set(times) == {0, 8} and all(seconds > 0 for seconds in times.values())


def test_on_a_cpu_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "on_gpu", lambda: False)
    monkeypatch.setattr(module, "_quantised", lambda *given: pytest.fail("tried"))
    model = make("llama")
    assert model.drafter is not None
    assert lightest(model.drafter, model.target) is model.drafter


@pytest.mark.parametrize("draft_vocab", [None, 24])
def test_a_factored_head_reads_a_quantised_targets_rows_as_they_are(draft_vocab: int | None) -> None:
    quantised = make_model("llama", intermediate_size=64)
    nn.quantize(quantised, group_size=32, bits=4)
    target = Target(quantised, "tiny")
    drafter = make_drafter(target, head="factored", draft_vocab_size=draft_vocab)
    if draft_vocab is not None:
        drafter.d2t = 2 * mx.arange(draft_vocab, dtype=mx.int32)  # every third token
        drafter.bind(target)
    packed = drafter._rows
    assert isinstance(packed, PackedRows)
    dense: Rows = Product(target.output_rows(drafter.target_ids()))
    assert packed.nbytes < dense.nbytes / 3
    hidden, tokens = mx.random.normal((1, 32), key=mx.random.key(0)), mx.array([[1, 2, 3]])
    got = drafter.logits(hidden, tokens, target.embed)
    full = full_head(drafter).logits(hidden, tokens, target.embed)
    drafter._rows = dense
    want = drafter.logits(hidden, tokens, target.embed)
    for other in (got, full):
        np.testing.assert_allclose(np.array(other), np.array(want), rtol=1e-4, atol=1e-4)

"""Fewer bits for a drafter where a GPU is faster with them. Times are made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.toy import make, make_drafter, make_model

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np

from redrafter_mlx.drafters import beam, precision
from redrafter_mlx.drafters.kinds import load_drafter, save_drafter
from redrafter_mlx.drafters.precision import choose_precision
from redrafter_mlx.drafters.quantization import quantize
from redrafter_mlx.drafters.recurrent import RecurrentDrafter, full_head
from redrafter_mlx.drafters.recurrent_config import changed
from redrafter_mlx.files import named_weights
from redrafter_mlx.generation import Model, generate
from redrafter_mlx.kernels import DenseWeight
from redrafter_mlx.target import Target
from redrafter_mlx.target.rows import QuantizedRows

SECONDS = {0: 1.0, 8: 0.9, 4: 0.5}


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Model:
    """As if on a GPU, and with a drafter that is ready for search."""
    monkeypatch.setattr(precision, "on_gpu", lambda: True)
    monkeypatch.setattr(precision, "GROUP_SIZE", 32)
    model = make("llama")
    drafter_of(model).eval()
    drafter_of(model).attach(model.target)
    return model


def drafter_of(model: Model) -> RecurrentDrafter:
    assert isinstance(model.drafter, RecurrentDrafter)
    return model.drafter


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
    monkeypatch.setattr(precision, "_search_seconds", lambda choices, target: seconds)
    drafter = drafter_of(model)
    nbytes, key = drafter.nbytes, drafter.cost_key()
    choose_precision(drafter, model.target)
    searched = drafter._rounded
    if not bits:
        assert searched is None and drafter.recurrence().drafter is drafter
        assert (drafter.nbytes, drafter.cost_key()) == (nbytes, key)
        return
    assert searched is not None and drafter.recurrence().drafter is searched
    assert searched.config.quantization == {"bits": bits, "group_size": 32}
    assert isinstance(searched.lm_head[0].linear, nn.QuantizedLinear)
    assert searched.lm_head[0].linear.bits == bits
    assert drafter.nbytes == searched.nbytes < nbytes / 2
    assert drafter.cost_key() == {**key, "quantization": {"bits": bits, "group_size": 32}}
    assert not isinstance(drafter.lm_head[0].linear, nn.QuantizedLinear), "the one given stays"
    assert drafter.config.quantization is None
    hidden, tokens = mx.random.normal((1, 32), key=mx.random.key(0)), mx.array([[1, 2, 3]])
    want = drafter.logits(hidden, tokens, model.target.embed)
    got = searched.logits(hidden, tokens, model.target.embed)
    assert 0 < float(mx.abs(got - want).max()) < (0.05 if bits == 8 else 0.5) * float(want.std())


def test_what_is_emitted_stays(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_search_seconds", lambda choices, target: SECONDS)
    _, plain = generate(model, [1, 2, 3], max_tokens=40, draft="off")
    choose_precision(drafter_of(model), model.target)
    assert drafter_of(model)._rounded is not None
    _, drafted = generate(model, [1, 2, 3], max_tokens=40, draft="3x4@8")
    assert drafted.token_ids == plain.token_ids


def test_what_is_saved_are_the_original_weights(
    model: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(precision, "_search_seconds", lambda choices, target: SECONDS)
    drafter = drafter_of(model)
    before = {name: mx.array(array) for name, array in named_weights(drafter).items()}
    choose_precision(drafter, model.target)
    assert drafter._rounded is not None
    save_drafter(drafter, tmp_path / "saved")
    again = load_drafter(tmp_path / "saved")
    assert isinstance(again, RecurrentDrafter)
    assert again.config == drafter.config and again.config.quantization is None
    weights = named_weights(again)
    assert weights.keys() == before.keys()
    for name, array in before.items():
        assert weights[name].dtype == array.dtype and mx.array_equal(weights[name], array), name


def test_a_drafter_stored_in_few_bits_stays_as_it_is(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_search_seconds", lambda choices, target: SECONDS)
    drafter = make_drafter(model.target)
    quantize(drafter, {"bits": 8, "group_size": 32})
    drafter.config = changed(drafter.config, quantization={"bits": 8, "group_size": 32})
    choose_precision(drafter, model.target)
    assert drafter._rounded is None


def test_searches_are_timed_in_turn(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[Any] = []
    search = beam.search
    monkeypatch.setattr(
        precision, "search", lambda rnn, *given: order.append(rnn.drafter) or search(rnn, *given)
    )
    first, second = drafter_of(model), make_drafter(model.target)
    seconds = precision._search_seconds({0: first, 8: second}, model.target)
    assert set(seconds) == {0, 8} and all(each > 0 for each in seconds.values())
    assert order == [first, second] * (1 + precision.ROUNDS)


def test_on_a_cpu_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "on_gpu", lambda: False)
    monkeypatch.setattr(precision, "_rounded", lambda *given: pytest.fail("tried"))
    model = make("llama")
    choose_precision(drafter_of(model), model.target)
    assert drafter_of(model)._rounded is None


@pytest.mark.parametrize("draft_vocab", [None, 24])
def test_a_factored_head_reads_a_quantized_targets_rows_as_they_are(draft_vocab: int | None) -> None:
    quantized = make_model("llama", intermediate_size=64)
    nn.quantize(quantized, group_size=32, bits=4)
    target = Target(quantized, "tiny")
    drafter = make_drafter(target, head="factored", draft_vocab_size=draft_vocab)
    if draft_vocab is not None:
        drafter.d2t = mx.arange(draft_vocab, dtype=mx.int32)  # every second token
        drafter.attach(target)
    rows = drafter._rows
    assert isinstance(rows, QuantizedRows)
    dense = DenseWeight(target.output_rows(drafter.target_ids()))
    assert rows.nbytes < dense.nbytes / 3
    hidden, tokens = mx.random.normal((1, 32), key=mx.random.key(0)), mx.array([[1, 2, 3]])
    got = drafter.logits(hidden, tokens, target.embed)
    full = full_head(drafter).logits(hidden, tokens, target.embed)
    drafter._rows = dense
    want = drafter.logits(hidden, tokens, target.embed)
    for other in (got, full):
        np.testing.assert_allclose(np.array(other), np.array(want), rtol=1e-4, atol=1e-4)

"""What packing anew does to greedy tokens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tests.toy import make_model

# isort: split
import mlx.core as mx

from redrafter_mlx.loading.gguf.probe import agreement

LETTERS: Any = SimpleNamespace(encode=lambda text: [ord(letter) % 60 for letter in text])


def test_a_model_agrees_with_itself_and_less_with_another() -> None:
    model = make_model("llama", 0)
    same, count = agreement(model, make_model("llama", 0), LETTERS)
    assert same == count == 128
    other, count = agreement(model, make_model("llama", 1), LETTERS)
    assert other < count
    rounded = make_model("llama", 0)
    rounded.update({"lm_head": {"weight": mx.round(rounded["lm_head"]["weight"] * 8) / 8}})
    near, count = agreement(model, rounded, LETTERS)
    assert other < near <= count

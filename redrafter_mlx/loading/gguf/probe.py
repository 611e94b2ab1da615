"""What packing a GGUF's tensors anew does to the text: the greedy tokens with and without, all through a probe text."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

TEXT = """The river had risen overnight, and by morning the lower fields were under water. Anna counted the sheep twice,
wrote 42 into the book, and called her brother. "Bring the boat," she said.

def area(width, height):
    return width * height

1. Paris is the capital of France.
2. Water boils at 100 degrees Celsius.
"""
MOST_TOKENS = 128


def agreement(packed: nn.Module, exact: nn.Module, tokenizer: TokenizerWrapper) -> tuple[int, int]:
    """After how many tokens of the probe text both models would say the same token, and how many there are."""
    tokens = mx.array(tokenizer.encode(TEXT)[:MOST_TOKENS], dtype=mx.int32)[None]
    choices = [mx.argmax(model(tokens)[0], axis=-1) for model in (packed, exact)]
    return int(mx.sum(choices[0] == choices[1])), tokens.shape[1]

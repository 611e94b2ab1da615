"""Well-conditioned coordinates for training, folded away in the weights that are saved.

A target's hidden state has a few dimensions that are ten times larger than the rest and nearly constant, and its
embeddings may be very small. Adam, which moves every weight by about the same amount, diverges on the first and hardly
moves on the second. So the optimizer sees weights for standardized inputs, (context - mean) / deviation and embedding /
rms, and `fold` turns them into weights for the inputs as they are: the same function, without a new parameter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from redrafter_mlx.drafters.recurrent import RecurrentDrafter
from redrafter_mlx.target import Target

from .corpus import Corpus

Weights = dict[str, Any]
SAMPLE = 4096


@dataclass(frozen=True, slots=True)
class Scaling:
    """Means and deviations of a drafter's inputs over its corpus."""

    mean: mx.array
    """(C,)"""
    deviation: mx.array
    """(C,)"""
    embedding: float
    """Root mean square of the embeddings' entries."""

    @classmethod
    def of(cls, corpus: Corpus, target: Target, sample: int = SAMPLE) -> Scaling:
        contexts, tokens = corpus.sample(sample)
        embeddings = target.embed(mx.array(tokens)).astype(mx.float32)
        return cls(
            mx.array(contexts.mean(axis=0)),
            mx.array(np.maximum(contexts.std(axis=0), 1e-3)),
            max(float(np.sqrt(np.square(np.array(embeddings)).mean())), 1e-6),
        )

    def fold(self, weights: Weights) -> Weights:
        """Weights for standardized inputs -> weights for the inputs as they are."""
        out = dict(weights)
        if "rnn_w" in weights:
            out["rnn_w"] = {"weight": weights["rnn_w"]["weight"] / self.embedding}
        if "input_proj" in weights:
            weight, bias = weights["input_proj"]["weight"], weights["input_proj"]["bias"]
            size = self.mean.size
            context = weight[:, :size] / self.deviation
            out["input_proj"] = {
                "weight": mx.concatenate([context, weight[:, size:]], axis=1),
                "bias": bias - context @ self.mean,
            }
        return out

    def unfold(self, weights: Weights) -> Weights:
        """The inverse of `fold`."""
        out = dict(weights)
        if "rnn_w" in weights:
            out["rnn_w"] = {"weight": weights["rnn_w"]["weight"] * self.embedding}
        if "input_proj" in weights:
            weight, bias = weights["input_proj"]["weight"], weights["input_proj"]["bias"]
            size = self.mean.size
            context = weight[:, :size]
            out["input_proj"] = {
                "weight": mx.concatenate([context * self.deviation, weight[:, size:]], axis=1),
                "bias": bias + context @ self.mean,
            }
        return out


def init_weights(drafter: RecurrentDrafter, scaling: Scaling) -> None:
    """Set a drafter's weights so that the values of every layer are of about unit size.

    Residual blocks start as the identity. Starting a factored head as the target's own, whose first guess is the root
    again, learned more slowly (docs/notes/drafter-runs.md).
    """
    config = drafter.config
    size, exit_dim = config.hidden_size, config.exit_dim

    def normal(rows: int, columns: int, gain: float = 1.0) -> mx.array:
        return mx.random.normal((rows, columns)) * (gain * columns**-0.5)

    weights: Weights = {"lm_head": [{"linear": tree_zeros(b.linear)} for b in drafter.lm_head[:-1]]}
    weights["lm_head"].append({"weight": normal(drafter.lm_head[-1].weight.shape[0], exit_dim, 0.5)})
    if config.rnn:
        weights["rnn_w"] = {"weight": normal(size, size)}
        weights["rnn_u"] = {"weight": normal(size, size, 0.5), "bias": mx.zeros((size,))}
    if drafter.has_input_proj:
        parts = [normal(exit_dim, config.context_size), normal(exit_dim, size, 2.0)]
        weights["input_proj"] = {
            "weight": mx.concatenate(parts, axis=1),
            "bias": mx.zeros((exit_dim,)),
        }
    drafter.update(scaling.fold(weights))


def tree_zeros(module: nn.Module) -> Weights:
    """Zeros in the shape of a module's parameters."""
    return {name: mx.zeros_like(value) for name, value in module.parameters().items()}

"""The network of the recurrent drafter: from a context and the tokens after it to logits for the next one.

    s_t = SiLU(rnn_w E(x_t) + rnn_u s_{t-1} + b)     s_0 = 0, E: the target's embedding   (rnn)
    s_t = E(x_t) + s_{t-1}                                                                (no rnn)
    z   = [context ; s_t]        -> input_proj where exit_dim differs
    z   = z + SiLU(linear_i(z))  for every residual block
    logits = lm_head[N] z        head "full";    rows (lm_head[N] z)   head "factored"

`rows` are rows of the target's own output embedding, so a factored drafter carries no vocabulary matrix.
Source: ReDrafter paper (arXiv 2403.09919) section 3 and apple/ml-recurrent-drafter `docs/drafter.md`; the names of
tensors are those of Apple's checkpoints.

Letters: B batch, K tokens in a row, H hidden size, C context size (H, or more with `context_layers`), X exit_dim, V the
drafter's vocabulary.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from redrafter_mlx.kernels import DenseWeight, Weight, constant_weight, optimize_layout, silu

from .interface import Embed
from .recurrent_config import DrafterConfig


class ResBlock(nn.Module):
    """x + SiLU(linear(x))."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)

    def __call__(self, x: mx.array) -> mx.array:
        return x + silu(self.linear(x))


class RecurrentNetwork(nn.Module):
    """The layers and formulas of the drafter. A factored head gives no logits before its target's rows are there."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.config = config
        size, exit_dim = config.hidden_size, config.exit_dim
        if config.rnn:
            self.rnn_u = nn.Linear(size, size, bias=True)
            self.rnn_w = nn.Linear(size, size, bias=False)
        if self.has_input_proj:
            self.input_proj = nn.Linear(config.context_size + size, exit_dim, bias=True)
        out = config.draft_vocab if config.head == "full" else size
        blocks: list[nn.Module] = [ResBlock(exit_dim) for _ in range(config.num_draft_layers)]
        self.lm_head = [*blocks, nn.Linear(exit_dim, out, bias=False)]
        if config.draft_vocab_size is not None:
            self.d2t = mx.zeros((config.draft_vocab_size,), dtype=mx.int32)
            self.freeze(keys=["d2t"], recurse=False)
        self._rows: Weight | None = None  # the target's; not parameters
        self._parts: tuple[Weight, Weight] | None = None  # of input_proj, for the context and for the state

    @property
    def has_input_proj(self) -> bool:
        return self.config.exit_dim != self.config.context_size + self.config.hidden_size

    def optimize_layout(self, num_cores: int | None) -> None:
        """Prepare final weights for products of few rows: split `input_proj` into its context and state parts, which
        would otherwise be done at every level of a search, and make tiled copies where they are faster.

        Args:
            num_cores: how many of a CPU's cores the products use; None for all.
        """
        optimize_layout(self, num_cores)
        if isinstance(self._rows, DenseWeight):
            self._rows = constant_weight(self._rows.weight, num_cores)
        if self._splits_projection:
            context, state = (constant_weight(mx.contiguous(each), num_cores) for each in self._projections())
            self._parts = context, state

    def update(  # type: ignore[override]
        self, parameters: dict[str, Any], strict: bool = True
    ) -> RecurrentNetwork:
        """As `nn.Module.update`; what was prepared from the old weights is dropped."""
        self._parts = None
        super().update(parameters, strict)
        return self

    @property
    def _splits_projection(self) -> bool:
        return self.has_input_proj and not isinstance(self.input_proj, nn.QuantizedLinear)

    def _projections(self) -> tuple[mx.array, mx.array]:
        """Weights of `input_proj` for the context (X, C) and for the state (X, H)."""
        weight, size = self.input_proj.weight, self.config.context_size
        return weight[:, :size], weight[:, size:]

    def _project(self, x: mx.array, part: int) -> mx.array:
        """x times one part of `input_proj`: 0, for the context, or 1, for the state."""
        return x @ self._projections()[part].T if self._parts is None else self._parts[part](x)

    def target_ids(self) -> mx.array | None:
        """(V,) int32: the target's id of every draft token; None where they are the same."""
        if self.config.draft_vocab_size is None:
            return None
        return mx.arange(self.config.draft_vocab_size, dtype=mx.int32) + self.d2t

    def draft_ids(self) -> mx.array:
        """(vocab_size,) int32: the drafter's id of every token of the target; -1 outside its vocabulary."""
        own = mx.arange(self.config.draft_vocab, dtype=mx.int32)
        ids = self.target_ids()
        if ids is None:
            return own
        out = mx.full((self.config.vocab_size,), -1, dtype=mx.int32)
        out[ids] = own
        return out

    def next_state(self, state: mx.array | None, embedding: mx.array) -> mx.array:
        """One RNN step. state (..., H), None before the first token; embedding (..., H) -> (..., H)."""
        if not self.config.rnn:
            return embedding if state is None else embedding + state
        linear = self.config.activation == "linear"
        if state is None:
            x = self.rnn_w(embedding)
            return x if linear else silu(x + self.rnn_u.bias)
        x = self.rnn_w(embedding) + self.rnn_u(state)
        return x if linear else silu(x)

    def states(self, embeddings: mx.array) -> mx.array:
        """RNN state after every token. (B, K, H) -> (B, K, H)."""
        state, out = None, []
        for k in range(embeddings.shape[1]):
            state = self.next_state(state, embeddings[:, k])
            out.append(state)
        return mx.stack(out, axis=1)

    def prepare(self, context: mx.array) -> mx.array:
        """The part of `features` that depends on the context alone, which a search therefore computes once.

        (..., C) -> (..., X), or (..., C) as it is where nothing can be computed ahead.
        """
        if not self._splits_projection:
            return context
        return self._project(context, 0) + self.input_proj.bias

    def features(self, prepared: mx.array, states: mx.array) -> mx.array:
        """Prepared context and states (..., H) -> the input of `head`: (..., X), or (..., H) of a factored one."""
        if self._splits_projection:
            x = prepared + self._project(states, 1)
        else:
            x = mx.concatenate([prepared, states], axis=-1)
            x = self.input_proj(x) if self.has_input_proj else x
        for layer in self.lm_head[:-1]:
            x = layer(x)
        return self.lm_head[-1](x) if self.config.head == "factored" else x

    def head(self, features: mx.array) -> mx.array:
        """features (..., X or H) -> logits (..., V) over the drafter's vocabulary."""
        if self.config.head == "full":
            return self.lm_head[-1](features)
        if self._rows is None:
            raise ValueError("a drafter with head 'factored' must be attached to its target: attach(target)")
        return self._rows(features)

    def logits(self, hidden: mx.array, tokens: mx.array, embed: Embed) -> mx.array:
        """Logits for the token after each of `tokens`, which the RNN reads in order.

        Args:
            hidden: (B, C) the target's hidden state before tokens[:, 0] (final norm applied).
            tokens: (B, K) int, the root first.
            embed: token ids -> vectors (..., H), scaled as the target scales them.

        Returns:
            (B, K, V) over the drafter's vocabulary; `target_ids` maps a reduced one to the target's tokens.
        """
        states = self.states(embed(tokens))
        prepared = self.prepare(hidden)[:, None]
        prepared = mx.broadcast_to(prepared, (*states.shape[:2], prepared.shape[-1]))
        return self.head(self.features(prepared, states))

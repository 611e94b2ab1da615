"""Any mlx-lm model as the target: a token tree in, contexts and logits out.

The model's own code runs, so its scaling, soft-capping and head stay in force. What is attached to the loaded instance:
what gives its hidden states notes them (`capture`), whatever computes with positions learns where the rows of a tree
stand (`positions`), recurrent layers note what they read (`recurrent`), and on a CPU its linear layers, SwiGLU and
attention take faster forms (`redrafter_mlx.kernels`). mlx-lm itself and other models of the process are left alone.

Letters: N rows, H hidden size, C context size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from redrafter_mlx.kernels import optimize_target
from redrafter_mlx.tree import TokenTree

from . import capture
from .cache import KVCache, check_bits, group_size_of
from .check import Drafts, check_drafts
from .positions import Positions
from .recurrent import Recorder
from .rows import QuantizedRows


@dataclass(frozen=True, slots=True)
class Verified:
    """What one forward gives for its N rows."""

    contexts: mx.array
    """(N, C): final-norm hidden state, then the `context_layers`, RMS-normalized"""
    logits: mx.array
    """(N, V)"""
    run: mx.array | None = None
    """(n, C) contexts of all rows of a run of text, where the others are of its last row"""


class Target:
    """A loaded mlx-lm model, made ready for verification.

    Args:
        model: mlx-lm's `Model`.
        name: what to call it in messages and drafter configs.
        max_length: positions it was trained for; None when unknown.

    Raises:
        ValueError: a model whose parts cannot be found, or one that does not compute numbers.
    """

    def __init__(self, model: nn.Module, name: str, max_length: int | None = None) -> None:
        self.model = model
        self.name = name
        self.max_length = max_length
        self.context_layers: tuple[int, ...] = ()
        self._notes: dict[int, mx.array] = {}
        self._noted: set[int] = set()
        self._kv_group_size: int | None = None  # of a quantized KV cache
        optimize_target(model)
        parts = capture.find_parts(model)
        self._layers: Sequence[nn.Module] = model.layers
        self.embedding, self.embedding_scale = parts.embedding, parts.embedding_scale
        self._head, self._is_tied = parts.head, parts.is_tied
        impossible = parts.logits == -mx.inf  # a token that the model rules out
        is_number = mx.isfinite(parts.logits) | (impossible & ~mx.all(impossible, axis=-1, keepdims=True))
        if not mx.all(is_number).item():
            raise ValueError(
                f"{name} computes logits that are not finite: its weights are damaged or overflow"
            )
        self._sees_beyond_window = parts.sees_beyond_window
        self._positions = Positions.of(model)
        self._recorder = Recorder.of(model, parts.recurrent)
        capture.note_output(parts.final, self._notes, capture.FINAL)
        self.hidden_size, self.vocab_size = parts.hidden.shape[-1], parts.logits.shape[-1]
        self.dtype = parts.hidden.dtype
        self.drafts = Drafts.of(KVCache.of(model))
        """what may be verified; see `check_drafts`"""

    @property
    def branches(self) -> bool:
        """True where token trees can be verified; False: chains only, or no drafts at all."""
        return self.drafts.branches

    def widest(self, most: int) -> int:
        """The greatest beam width up to `most` that can be verified: 1 where only chains can."""
        return most if self.branches else 1

    @property
    def depends_on_cut(self) -> bool:
        """True where what a row computes depends on the rows that it is processed with.

        A prompt must then be cut as mlx-lm cuts it, its last token alone, and a turn cannot go on with the cache of
        the one before.
        """
        return self._sees_beyond_window or not self.drafts.chains

    def watch(self, layers: Sequence[int]) -> None:
        """Have the outputs of these layers (from 0) join the context.

        Raises:
            ValueError: the model has no such layer.
        """
        for layer in layers:
            if not 0 <= layer < len(self._layers):
                raise ValueError(
                    f"context_layers must lie in 0..{len(self._layers) - 1}, the target's layers, not {layer}"
                )
            if layer not in self._noted:
                capture.note_output(self._layers[layer], self._notes, layer)
                self._noted.add(layer)
        self.context_layers = tuple(layers)

    @property
    def context_size(self) -> int:
        """C: the final hidden state and the watched layers' outputs after it."""
        return self.hidden_size * (1 + len(self.context_layers))

    def new_cache(self, bits: int | None = None) -> KVCache:
        """An empty KV cache for this model; `bits` quantizes keys and values.

        Raises:
            ValueError: `bits` does not suit the model.
        """
        if bits is None:
            cache = KVCache.of(self.model)
        else:
            check_bits(bits)
            if self._kv_group_size is None:  # the model runs for it, so once
                self._kv_group_size = group_size_of(self.model, self._try)
            cache = KVCache.of(self.model, bits, self._kv_group_size)
        cache.recorder = self._recorder
        return cache

    def _try(self, cache: KVCache) -> None:
        """Run some rows, and then one, on `cache`."""
        for rows in (2, 1):
            cache.begin(None)
            mx.eval(self.model(mx.arange(rows)[None], cache=cache.layers))
            cache.commit(rows)

    def verify_all(self, trees: Sequence[TokenTree], caches: Sequence[KVCache]) -> list[Verified]:
        """`verify` for several texts."""
        return [self.verify(tree, cache) for tree, cache in zip(trees, caches, strict=True)]

    def verify(self, tree: TokenTree, cache: KVCache) -> Verified:
        """One forward over the tree's N nodes; what the layers keep of them waits in `cache` for `keep`.

        Raises:
            ValueError: a tree for a model that takes chains only.
        """
        if not (tree.is_chain or self.branches):
            raise ValueError(f"{self.name} verifies chains, not trees: {self.drafts.reason}")
        cache.begin(tree)
        with self._positions.under(tree), self._recorder.into(cache.records):
            logits = self.model(tree.tokens[None], cache=cache.layers)[0]
        return Verified(self._contexts()[0], logits)

    def extend(self, tokens: mx.array, cache: KVCache) -> Verified:
        """One forward over a run of text (n,), which is committed; results of its last row, (1, ...), and `run`."""
        cache.begin(None)
        logits = self.model(tokens[None], cache=cache.layers)[0, -1:]
        contexts = self._contexts()[0]
        verified = Verified(contexts[-1:], logits, contexts)
        cache.commit(tokens.shape[0])
        return verified

    def forward(self, tokens: mx.array, cache: list[object]) -> tuple[mx.array, mx.array]:
        """One forward of a batch of texts on mlx-lm's own cache. (B, T) -> logits (B, T, V), contexts (B, T, C)."""
        logits = self.model(tokens, cache=cache)
        return logits, self._contexts()

    def contexts(self, tokens: mx.array) -> mx.array:
        """Context of every position of a batch of texts. (B, T) int -> (B, T, C)."""
        made = make_prompt_cache(self.model)
        # Where layers share keys and values, mlx-lm computes something else without a cache.
        self.model(tokens, cache=made if len(made) != len(self._layers) else None)
        return self._contexts()  # the logits are never computed

    def _contexts(self) -> mx.array:
        final = self._notes[capture.FINAL]
        if not self.context_layers:
            return final
        missing = [layer for layer in self.context_layers if layer not in self._notes]
        if missing:
            raise ValueError(
                f"{self.name} ({type(self.model).__module__}) does not run its layer {missing[0]} as a module, so "
                "context_layers cannot name it"
            )
        others = [mx.fast.rms_norm(self._notes[i], None, 1e-5) for i in self.context_layers]
        return mx.concatenate([final, *others], axis=-1)

    def embed(self, tokens: mx.array) -> mx.array:
        """Token ids (...) -> vectors (..., H), scaled as the model scales them."""
        vectors = self.embedding(tokens)
        return vectors if self.embedding_scale == 1 else vectors * self.embedding_scale

    @property
    def has_own_head(self) -> bool:
        """False where the output head is the input embedding (tied)."""
        return not self._is_tied

    def output_rows(self, tokens: mx.array | None = None) -> mx.array:
        """Rows of the output embedding, (n, H) in the model's dtype; all of them without `tokens`.

        Raises:
            ValueError: the model makes its logits in another way than by a linear layer or its input embedding.
        """
        quantized = self.quantized_rows(tokens)
        if quantized is not None:
            return quantized.dense().astype(self.dtype)
        rows = self._output_head().weight
        return (rows if tokens is None else rows[tokens]).astype(self.dtype)

    def quantized_rows(self, tokens: mx.array | None = None) -> QuantizedRows | None:
        """The same as the model keeps them, where it is quantized; None where it is not."""
        head = self._output_head()
        if head.get("scales") is None:
            return None
        rows = slice(None) if tokens is None else tokens
        biases = None if head.get("biases") is None else head.biases[rows]
        mode = getattr(head, "mode", "affine")
        return QuantizedRows(head.weight[rows], head.scales[rows], biases, head.group_size, head.bits, mode)

    def _output_head(self) -> nn.Module:
        head = self.embedding if self._is_tied else self._head
        if head is None:
            raise ValueError(
                f"{self.name} ({type(self.model).__module__}) has no output head whose rows could be taken"
            )
        return head

    def check_tree(self) -> None:
        """Verify small trees and chains, near a text's beginning and far into it, and compare them with plain decoding.

        What does not agree is not verified from then on (`drafts`); a warning says so.
        """
        self.drafts = check_drafts(self)

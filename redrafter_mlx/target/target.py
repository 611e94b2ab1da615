"""Any mlx-lm model as the target: a token tree in, contexts and logits out.

The model's own code runs, so its scaling, soft-capping and head stay in force. What is attached to the loaded instance:
its inner model and chosen layers note their outputs (`capture`), every `rope` also takes a position per row (`rope`),
and on a CPU its linear layers, SwiGLU and attention take faster forms (`redrafter_mlx.kernels`). mlx-lm itself and
other models of the process are left alone.

Letters: N rows, H hidden size, C context size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from redrafter_mlx.kernels import optimize_target, shared_rotations
from redrafter_mlx.tree import TokenTree, ancestor_mask, chain

from . import capture
from .cache import KVCache, check_bits, group_size_of
from .rope import TreeRope
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
        self._inner = capture.inner_model(model)
        self._layers: Sequence[nn.Module] = model.layers
        self.embedding: nn.Module = capture.input_embedding(self._inner)
        capture.note_output(self._inner, self._notes, capture.FINAL)
        rotations = shared_rotations()
        for module in model.modules():
            if isinstance(module.get("rope"), nn.Module) and not isinstance(module.rope, TreeRope):
                module.rope = TreeRope(module.rope, rotations)
        optimize_target(model)
        self.embedding_scale, logits = capture.probe(model, self._layers[0], self.embedding)
        if not mx.all(mx.isfinite(logits)).item():
            raise ValueError(
                f"{name} computes logits that are not finite: its weights are damaged or overflow"
            )
        hidden = self._notes[capture.FINAL]
        self.hidden_size, self.vocab_size, self.dtype = hidden.shape[-1], logits.shape[-1], hidden.dtype

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
            ValueError: the model keeps something else than keys and values, or `bits` does not suit it.
        """
        if bits is None:
            return KVCache.of(self.model)
        check_bits(bits)
        if self._kv_group_size is None:  # the model runs for it, so once
            self._kv_group_size = group_size_of(self.model)
        return KVCache.of(self.model, bits, self._kv_group_size)

    def verify_all(self, trees: Sequence[TokenTree], caches: Sequence[KVCache]) -> list[Verified]:
        """`verify` for several texts."""
        return [self.verify(tree, cache) for tree, cache in zip(trees, caches, strict=True)]

    def verify(self, tree: TokenTree, cache: KVCache) -> Verified:
        """One forward over the tree's N nodes; their keys and values wait in `cache` for `keep`."""
        cache.begin(tree)
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
        """Context of every position of a batch of texts, no cache. (B, T) int -> (B, T, C)."""
        self._inner(tokens)
        return self._contexts()

    def _contexts(self) -> mx.array:
        final = self._notes[capture.FINAL]
        if not self.context_layers:
            return final
        others = [mx.fast.rms_norm(self._notes[i], None, 1e-5) for i in self.context_layers]
        return mx.concatenate([final, *others], axis=-1)

    def embed(self, tokens: mx.array) -> mx.array:
        """Token ids (...) -> vectors (..., H), scaled as the model scales them."""
        vectors = self.embedding(tokens)
        return vectors if self.embedding_scale == 1 else vectors * self.embedding_scale

    @property
    def has_own_head(self) -> bool:
        """False where the output head is the input embedding (tied)."""
        return capture.output_head(self.model) is not None

    def output_rows(self, tokens: mx.array | None = None) -> mx.array:
        """Rows of the output embedding, (n, H) in the model's dtype; all of them without `tokens`."""
        quantized = self.quantized_rows(tokens)
        if quantized is not None:
            return quantized.dense().astype(self.dtype)
        rows = (capture.output_head(self.model) or self.embedding).weight
        return (rows if tokens is None else rows[tokens]).astype(self.dtype)

    def quantized_rows(self, tokens: mx.array | None = None) -> QuantizedRows | None:
        """The same as the model keeps them, where it is quantized; None where it is not."""
        head = capture.output_head(self.model) or self.embedding
        if head.get("scales") is None:
            return None
        rows = slice(None) if tokens is None else tokens
        biases = None if head.get("biases") is None else head.biases[rows]
        mode = getattr(head, "mode", "affine")
        return QuantizedRows(head.weight[rows], head.scales[rows], biases, head.group_size, head.bits, mode)

    def check_tree(self) -> None:
        """Verify a small tree and compare it with plain decoding of its paths.

        Raises:
            ValueError: the model derives more from the row order than its rope, so trees would be wrong.
        """
        tokens = mx.array([1, 2, 3, 4, 5], dtype=mx.int32) % self.vocab_size
        parents = mx.array([0, 0, 0, 2, 1], dtype=mx.int32)
        depth = mx.array([0, 1, 1, 2, 2], dtype=mx.int32)
        tree = TokenTree(tokens, parents, depth, ancestor_mask(parents, 2), 2)
        prompt = mx.arange(3, dtype=mx.int32) % self.vocab_size
        cache = self.new_cache()
        self.extend(prompt, cache)
        try:
            got = self.verify(tree, cache).logits.astype(mx.float32)
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(
                f"{self.name} ({type(self.model).__module__}) cannot verify a token tree: it takes no position per row "
                f"({error}). Load it without a drafter: drafter='none' (--drafter none)"
            ) from None
        for path in ([0, 1, 4], [0, 2, 3]):
            cache = self.new_cache()
            self.extend(prompt, cache)
            rows = mx.array(path)
            want = self.verify(chain(tokens[rows]), cache).logits.astype(mx.float32)
            difference = float(mx.abs(got[rows] - want).max())
            spread = float(want.std())
            if not difference <= 0.05 * spread + 1e-3:
                raise ValueError(
                    f"{self.name} ({type(self.model).__module__}) cannot verify a token tree: logits differ by "
                    f"{difference:.3g} from plain decoding. Load it without a drafter: drafter='none' (--drafter none)"
                )

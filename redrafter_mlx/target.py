"""Any mlx-lm model as the target: a token tree in, hidden states and logits out.

The model's own code runs unchanged, so its scaling, soft-capping and head stay in force. Three things are
attached to the loaded instance: its inner model and chosen layers note their outputs, and every `rope` also
takes a vector of positions, one per row.

Letters: N rows, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .activation import replace_exponentials
from .cache import KVCache
from .few_rows import tile_products
from .rope import Rotation, TreeRope
from .tree import TokenTree, ancestor_mask, chain


def _note_output(module: nn.Module, notes: dict[int, mx.array], key: int) -> None:
    """Make `module` write its output to `notes[key]`; its class is replaced by a subclass, nothing else."""
    original = type(module)

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        out = original.__call__(self, *args, **kwargs)
        notes[key] = out[0] if isinstance(out, tuple) else out
        return out

    module.__class__ = type(original.__name__, (original,), {"__call__": call})


@dataclass(frozen=True, slots=True)
class Verified:
    """What one forward gives for its N rows."""

    hidden: mx.array
    """(N, C): final-norm hidden state, then the `context_layers`, RMS-normalised"""
    logits: mx.array
    """(N, V)"""


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Quantised rows of an output embedding: a product with them reads a quarter or half of the bytes."""

    weight: mx.array
    scales: mx.array
    biases: mx.array | None
    group_size: int
    bits: int
    mode: str

    def __call__(self, x: mx.array) -> mx.array:
        """(..., H) -> (..., n)"""
        return mx.quantized_matmul(x, self.weight, self.scales, self.biases, transpose=True, **self._format())

    def dense(self) -> mx.array:
        """(n, H)"""
        return mx.dequantize(self.weight, self.scales, self.biases, **self._format())

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.weight, self.scales, self.biases) if part is not None)

    def _format(self) -> dict[str, Any]:
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}


_FINAL = -1


class Target:
    """A loaded mlx-lm model, made ready for verification.

    Args:
        model: mlx-lm's `Model`.
        name: what to call it in messages and drafter configs.
        max_length: positions it was trained for; None when unknown.
    """

    def __init__(self, model: nn.Module, name: str, max_length: int | None = None) -> None:
        self.model = model
        self.name = name
        self.max_length = max_length
        self.context_layers: tuple[int, ...] = ()
        self._notes: dict[int, mx.array] = {}
        self._inner = _inner_model(model)
        self._layers: Sequence[nn.Module] = model.layers
        _note_output(self._inner, self._notes, _FINAL)
        rotations: dict[bytes, tuple[mx.array, Rotation]] = {}
        for module in model.modules():
            if isinstance(module.get("rope"), nn.Module) and not isinstance(module.rope, TreeRope):
                module.rope = TreeRope(module.rope, rotations)
        replace_exponentials(model)
        tile_products(model)
        self.embedding: nn.Module = _embedding(self._inner)
        self.embedding_scale, self.hidden_size, self.vocab_size, self.dtype = self._probe()

    def _probe(self) -> tuple[float, int, int, mx.Dtype]:
        """Run one token to learn the sizes and what the model multiplies its embedding by."""
        first = self._layers[0]
        seen: list[mx.array] = []
        original = type(first)

        def call(module: nn.Module, x: mx.array, *args: Any, **kwargs: Any) -> Any:
            seen.append(x)
            return original.__call__(module, x, *args, **kwargs)

        first.__class__ = type(original.__name__, (original,), {"__call__": call})
        try:
            logits = self.model(mx.array([[1]]), cache=None)
        finally:
            first.__class__ = original
        vector = self.embedding(mx.array([1]))[0].astype(mx.float32)
        scaled = seen[0].reshape(-1).astype(mx.float32)
        scale = ((vector * scaled).sum() / (vector * vector).sum()).item()
        hidden = self._notes[_FINAL]
        return round(scale, 6), hidden.shape[-1], logits.shape[-1], hidden.dtype

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
            if layer not in self.context_layers:
                _note_output(self._layers[layer], self._notes, layer)
        self.context_layers = tuple(layers)

    def new_cache(self, bits: int | None = None, group_size: int = 64) -> KVCache:
        """An empty KV cache for this model; `bits` quantises keys and values."""
        return KVCache.of(self.model, bits, group_size)

    def verify(self, tree: TokenTree, cache: KVCache) -> Verified:
        """One forward over the tree's N nodes; their keys and values wait in `cache` for `keep`."""
        cache.begin(tree)
        logits = self.model(tree.tokens[None], cache=cache.layers)[0]
        return Verified(self._context()[0], logits)

    def extend(self, tokens: mx.array, cache: KVCache) -> Verified:
        """One forward over a run of text (n,), which is committed; results of its last row only, (1, ...)."""
        cache.begin(None)
        logits = self.model(tokens[None], cache=cache.layers)[0, -1:]
        verified = Verified(self._context()[0, -1:], logits)
        cache.commit(tokens.shape[0])
        return verified

    def contexts(self, tokens: mx.array) -> mx.array:
        """Context of every position of a batch of texts, no cache. (B, T) int -> (B, T, C)."""
        self._inner(tokens)
        return self._context()

    def _context(self) -> mx.array:
        final = self._notes[_FINAL]
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
        return self._head is not self.embedding

    @property
    def _head(self) -> nn.Module:
        for owner in (self.model, self.model.get("language_model")):
            for name in ("lm_head", "output"):
                if isinstance(owner, nn.Module) and isinstance(owner.get(name), nn.Module):
                    return owner[name]
        return self.embedding

    def output_rows(self, tokens: mx.array | None = None) -> mx.array:
        """Rows of the output embedding, (n, H) in the model's dtype; all of them without `tokens`."""
        packed = self.packed_rows(tokens)
        if packed is not None:
            return packed.dense().astype(self.dtype)
        rows = self._head.weight
        return (rows if tokens is None else rows[tokens]).astype(self.dtype)

    def packed_rows(self, tokens: mx.array | None = None) -> PackedRows | None:
        """The same as the model keeps them, where it is quantised; None where it is not."""
        head = self._head
        if head.get("scales") is None:
            return None
        rows = slice(None) if tokens is None else tokens
        biases = None if head.get("biases") is None else head.biases[rows]
        mode = getattr(head, "mode", "affine")
        return PackedRows(head.weight[rows], head.scales[rows], biases, head.group_size, head.bits, mode)

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
        got = self.verify(tree, cache).logits.astype(mx.float32)
        for path in ([0, 1, 4], [0, 2, 3]):
            cache = self.new_cache()
            self.extend(prompt, cache)
            rows = mx.array(path)
            want = self.verify(chain(tokens[rows]), cache).logits.astype(mx.float32)
            error = float(mx.abs(got[rows] - want).max())
            spread = float(want.std())
            if not error <= 0.05 * spread + 1e-3:
                raise ValueError(
                    f"{self.name} ({type(self.model).__module__}) cannot verify a token tree: logits differ by "
                    f"{error:.3g} from plain decoding; use draft='off'"
                )


def _inner_model(model: nn.Module) -> nn.Module:
    """The module whose output is the final-norm hidden state."""
    for path in (("model",), ("language_model", "model"), ("transformer",), ("language_model",)):
        module: Any = model
        for name in path:
            module = module.get(name) if isinstance(module, nn.Module) else None
        if isinstance(module, nn.Module):
            return module
    raise ValueError(f"{type(model).__module__} has no inner model whose hidden states could be read")


def _embedding(inner: nn.Module) -> nn.Module:
    for name in ("embed_tokens", "wte", "word_embeddings", "embeddings", "embedding"):
        if isinstance(inner.get(name), nn.Module):
            return inner[name]
    raise ValueError(f"{type(inner).__module__} has no input embedding that could be found")

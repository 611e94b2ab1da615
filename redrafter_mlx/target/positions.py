"""Where the rows of a forward stand, for models that know only where the first one does.

mlx-lm's models take the positions of the rows to be consecutive: they hand their rope, their learned positions or their
scaling by position the position of the first row. The nodes of a tree stand at `first + depth` instead. So everything
that computes with positions is wrapped, and asks here which depths the rows of the forward under way have.

Letters: N rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from redrafter_mlx.device import on_gpu
from redrafter_mlx.kernels import shared_rotations
from redrafter_mlx.rebinding import Replacements, rebind
from redrafter_mlx.tree import TokenTree

from .attach import attached, subclass
from .rope import TreeRope


class Positions:
    """The depths of the rows of the forward under way; attached to a model once."""

    def __init__(self) -> None:
        self.depth: mx.array | None = None
        """(N,) int32; None: the rows are consecutive"""
        self.height = 0
        self._known: dict[int, mx.array] = {}

    @classmethod
    def of(cls, model: nn.Module) -> Positions:
        """The positions of a model, whose modules are made to ask for them."""
        return attached(model, "_positions", lambda: cls()._attached(model))

    def _attached(self, model: nn.Module) -> Positions:
        rotations = shared_rotations()
        for module in list(model.modules()):
            for name, child in list(module.children().items()):
                if isinstance(child, nn.Module) and _is_rope(name, child):
                    setattr(module, name, TreeRope(child, rotations, self))
            if isinstance(module.get("wpe"), nn.Embedding):
                subclass(module.wpe, __call__=self._learned)
            if callable(getattr(module, "_rope", None)) and not isinstance(module._rope, nn.Module):
                subclass(module, _rope=self._rope_method)
        rebind(model, self._functions())
        return self

    def _functions(self) -> Replacements:
        """Functions of mlx-lm that compute with positions, and what takes their place."""
        return {
            "apply_rotary_emb": lambda theirs: partial(self._rotary, theirs),  # NanoChat
            "qk_norm_rope": lambda theirs: partial(self._norm_and_rotary, theirs),  # Muse Spark
            "_get_llama_4_attn_scale": lambda theirs: partial(
                self._attention_scale, theirs
            ),  # Ministral 3, Mistral 4
        }

    @contextmanager
    def under(self, tree: TokenTree) -> Iterator[None]:
        """Within, the rows are the nodes of `tree`."""
        # A run of rows could do with its first position. On a CPU a vector of them is faster: see rope.py.
        if tree.num_nodes > 1 and not (tree.is_chain and on_gpu()):
            self.depth, self.height = tree.depth, tree.height
        try:
            yield
        finally:
            self.depth, self._known = None, {}

    def at(self, first: int | mx.array, rows: int) -> mx.array | None:
        """Positions (N,) int32 of `rows` rows of which the first stands at `first`; None: they are consecutive."""
        if self.depth is None or self.depth.shape[0] != rows:
            return None
        if isinstance(first, mx.array):
            if first.size != 1:
                return None
            first = int(first.tolist())  # type: ignore[arg-type]  # made from a number (Gemma 4): there is nothing to wait for
        if first not in self._known:
            self._known[first] = self.depth + first
        return self._known[first]

    def _learned(self, original: type, module: nn.Module, ids: mx.array) -> mx.array:
        """A table of learned positions; ids (..., N) are consecutive."""
        rows = ids.shape[-1]
        if self.depth is not None and self.depth.shape[0] == rows:
            ids = ids - mx.arange(rows, dtype=ids.dtype) + self.depth.astype(ids.dtype)
        return original.__call__(module, ids)

    def _rope_method(self, original: type, module: nn.Module, x: mx.array, offset: int) -> mx.array:
        return self._rotated(lambda rows, at: original._rope(module, rows, at), x, offset)  # type: ignore[attr-defined]

    def _rotary(self, original: Callable[..., mx.array], x: mx.array, offset: int, **kwargs: Any) -> mx.array:
        return self._rotated(lambda rows, at: original(rows, at, **kwargs), x, offset)

    def _rotated(
        self, rotate: Callable[[mx.array, int | mx.array], mx.array], x: mx.array, offset: int
    ) -> mx.array:
        """x (1, heads, N, D) rotated row by row: `mx.fast.rope` takes a position per batch entry."""
        positions = self.at(offset, x.shape[2])
        if positions is None:
            return rotate(x, offset)
        return rotate(x.transpose(2, 1, 0, 3), positions).transpose(2, 1, 0, 3)

    def _norm_and_rotary(
        self, original: Callable[..., list[mx.array]], rows: mx.array, *, offset: int, **kwargs: Any
    ) -> list[mx.array]:
        """rows (1, N, C) -> queries and keys (1, N, heads, D)."""
        positions = self.at(offset, rows.shape[1])
        if positions is None:
            return original(rows, offset=offset, **kwargs)
        made = original(rows.swapaxes(0, 1), offset=positions, **kwargs)
        return [each.swapaxes(0, 1) for each in made]

    def _attention_scale(
        self, original: Callable[..., mx.array], size: int, offset: int, *args: Any
    ) -> mx.array:
        """(N, 1): what a row's queries are multiplied by."""
        positions = self.at(offset, size)
        if positions is None:
            return original(size, offset, *args)
        return original(1, positions, *args).reshape(size, 1)


def _is_rope(name: str, module: nn.Module) -> bool:
    if isinstance(module, TreeRope):
        return False
    words = f"{name} {type(module).__name__}".lower()
    code = getattr(type(module).__call__, "__code__", None)
    return ("rope" in words or "rotary" in words) and code is not None and "offset" in code.co_varnames

"""Where the parts of an unmodified mlx-lm model are, found by watching one forward, and its hidden states.

Models name their parts as they like and nest them as they like. What they compute shows what is what: the input
embedding is the one that is given the tokens, the output head the linear layer that makes logits, the final hidden
state what the last module before it gave. A module whose output is wanted afterwards gets a subclass of its class that
notes it; weights and code stay.

Letters: H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .attach import subclass
from .cache import KVCache
from .recurrent import RecurrentState, is_linear

FINAL = -1
"""Key of the final-norm hidden state; layers have their index from 0."""

PROBE_TOKENS = (1, 2, 3, 5, 8, 13)
"""Several, because a row of an embedding may be zero (padding)."""


def note_output(module: nn.Module, notes: dict[int, mx.array], key: int) -> None:
    """Make `module` write its output to `notes[key]`."""

    def call(original: type, this: nn.Module, *args: Any, **kwargs: Any) -> Any:
        out = original.__call__(this, *args, **kwargs)
        notes[key] = out[0] if isinstance(out, tuple) else out
        return out

    subclass(module, __call__=call)


@dataclass
class Parts:
    """What is what in a model."""

    embedding: nn.Module
    """turns tokens into vectors"""
    embedding_scale: float
    """what the first layer sees, in embeddings"""
    final: nn.Module
    """its output is the final hidden state"""
    head: nn.Module | None
    """the linear layer that makes logits; None: the input embedding does, or none that was found"""
    is_tied: bool
    """True where the input embedding makes the logits"""
    recurrent: list[nn.Module]
    """modules that write a recurrent state"""
    sees_beyond_window: bool
    """True where the rows of a run of text see more positions than a window keeps"""
    hidden: mx.array
    """(1, n, H) final hidden states of the tokens that were run"""
    logits: mx.array
    """(n, V)"""


def find_parts(model: nn.Module, tokens: Sequence[int] = PROBE_TOKENS) -> Parts:
    """Run some tokens and see which module does what.

    Raises:
        ValueError: a part is not there, what is kept cannot be verified, or the embedding's factor is no finite
            number: every row that was run is zero, or not finite.
    """
    name = type(model).__module__
    cache = KVCache.of(model)
    if not isinstance(getattr(model, "layers", None), (list, tuple)) or not len(model.layers):
        raise ValueError(f"{name} has no layers that could be watched")
    watched = _Watched(model, model.layers[0])
    with watched.attached(cache):
        cache.begin(None)
        try:
            logits = model(mx.array([tokens]), cache=cache.layers)[0]
        except (ValueError, TypeError, AttributeError, IndexError, KeyError, RuntimeError) as error:
            words = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"{name} does not run a forward of {len(tokens)} tokens: {words}") from None
    if watched.embedding is None:
        raise ValueError(f"{name} has no input embedding that could be found")
    vectors = watched.embedded[0]
    is_head = watched.head is not None and watched.head_output.shape[-1] == logits.shape[-1]
    head = watched.head if is_head else None
    size = watched.head_input.shape[-1] if is_head else vectors.shape[-1]
    before = len(watched.outputs) if not is_head else watched.outputs_before_head
    last = next(((m, out) for m, out in reversed(watched.outputs[:before]) if out.shape[-1] == size), None)
    if last is None:
        raise ValueError(f"{name} has no module whose output is the hidden state before its head")
    is_tied = head is watched.embedding or (head is None and _is_product(logits, vectors, watched))
    return Parts(
        watched.embedding, _scale(vectors, watched.first_inputs, tokens), last[0], None if is_tied else head,
        is_tied, list(watched.writers.values()), cache.sees_beyond_window, last[1], logits,
    )  # fmt: skip


def _scale(vectors: mx.array, seen: Sequence[mx.array], tokens: Sequence[int]) -> float:
    """What a model multiplies its embedding by: the factor in what its first layer sees; 1 where no such factor shows.

    vectors (n, H); each of `seen` is something that the first layer, or a module within it, was given.
    """
    own = vectors.astype(mx.float32)
    fitting = [x for x in seen if x.shape[-1] == own.shape[-1] and x.size % own.size == 0]
    if not fitting:
        return 1.0
    x = fitting[0].reshape(-1, *own.shape)[0].astype(mx.float32)
    scale: float = ((own * x).sum() / (own * own).sum()).tolist()  # type: ignore[assignment]
    if not abs(scale) < float("inf"):
        raise ValueError(
            f"the embedding's rows {list(tokens)} are zero or not finite (scale {scale}): damaged weights?"
        )
    return round(scale, 6)


def _is_product(logits: mx.array, vectors: mx.array, watched: _Watched) -> bool:
    """True where logits are the last hidden state times the embedding, up to a factor."""
    weight = watched.embedding.get("weight") if watched.embedding is not None else None
    hidden = next((out for _, out in reversed(watched.outputs) if out.shape[-1] == vectors.shape[-1]), None)
    if weight is None or hidden is None or weight.shape != (logits.shape[-1], hidden.shape[-1]):
        return False
    want = (hidden.reshape(-1, hidden.shape[-1])[-1] @ weight.T).astype(mx.float32)
    got = logits[-1].astype(mx.float32)
    cosine = (want * got).sum() / mx.sqrt((want * want).sum() * (got * got).sum())
    return bool((cosine > 0.99).item())


@dataclass
class _Watched:
    """What the modules of a model do in one forward."""

    model: nn.Module
    first_layer: nn.Module
    embedding: nn.Module | None = None
    embedded: list[mx.array] = field(default_factory=list)
    """(n, H) rows of the input embedding"""
    first_inputs: list[mx.array] = field(default_factory=list)
    outputs: list[tuple[nn.Module, mx.array]] = field(default_factory=list)
    """of every module that gives rows, in the order in which they finish"""
    outputs_before_head: int = 0
    head: nn.Module | None = None
    head_input: Any = None
    head_output: Any = None
    writers: dict[int, nn.Module] = field(default_factory=dict)
    _running: list[nn.Module] = field(default_factory=list)

    @contextmanager
    def attached(self, cache: KVCache) -> Iterator[None]:
        """Watch the forward within."""
        first = {id(module) for module in self.first_layer.modules()}
        modules = {id(module): module for module in self.model.modules()}
        classes = {key: type(module) for key, module in modules.items()}
        states = [state for state in cache.states if isinstance(state, RecurrentState)]
        kinds: dict[tuple[type, bool], type] = {}
        for key, module in modules.items():
            kind = (type(module), key in first)
            if kind not in kinds:
                kinds[kind] = self._subclass(*kind)
            module.__class__ = kinds[kind]
        for state in states:
            state.__class__ = _noted(self)
        try:
            yield
        finally:
            for key, module in modules.items():
                module.__class__ = classes[key]
            for state in states:
                state.__class__ = RecurrentState

    def _subclass(self, original: type, is_first: bool) -> type:
        def call(this: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if is_first and not self.first_inputs:
                self.first_inputs += [a for a in (*args, *kwargs.values()) if _is_rows(a)]
            self._running.append(this)
            before = len(self.outputs)
            try:
                out = original.__call__(this, *args, **kwargs)
            finally:
                self._running.pop()
            self._note(this, args, out, before)
            return out

        def as_linear(this: nn.Module, x: mx.array) -> mx.array:
            before = len(self.outputs)
            out: mx.array = original.as_linear(this, x)  # type: ignore[attr-defined]
            self.head, self.head_input, self.head_output, self.outputs_before_head = this, x, out, before
            return out

        methods: dict[str, Any] = {"__call__": call}
        if hasattr(original, "as_linear"):
            methods["as_linear"] = as_linear
        return type(original.__name__, (original,), methods)

    def _note(self, module: nn.Module, args: tuple[Any, ...], out: Any, before: int) -> None:
        rows = out[0] if isinstance(out, tuple) and out else out
        if not _is_rows(rows):
            return
        given = args[0] if args and isinstance(args[0], mx.array) else None
        is_leaf = not module.children()
        if (
            self.embedding is None
            and is_leaf
            and given is not None
            and mx.issubdtype(given.dtype, mx.integer)
        ):
            self.embedding = module
            self.embedded.append(rows.reshape(-1, rows.shape[-1]))
        elif is_linear(module):
            self.head, self.head_input, self.head_output, self.outputs_before_head = (
                module,
                given,
                rows,
                before,
            )
        self.outputs.append((module, rows))

    def _written(self) -> None:
        """A recurrent state was written by the module that is running."""
        module = self._running[-1]
        self.writers[id(module)] = module


def _noted(watched: _Watched) -> type:
    """A class of recurrent states that tell who writes them."""

    class Noted(RecurrentState):
        def __setitem__(self, index: int, value: mx.array) -> None:
            watched._written()
            super().__setitem__(index, value)

    return Noted


def _is_rows(value: Any) -> bool:
    return isinstance(value, mx.array) and value.ndim >= 3 and mx.issubdtype(value.dtype, mx.floating)

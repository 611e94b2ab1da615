"""States of recurrent layers: verified by capture and replay, so that a rejected row leaves no trace.

A recurrence (Mamba, gated delta nets, short convolutions, RWKV, ...) overwrites its state with every row, and rows
cannot be taken back out of it. So the state before a forward is kept, which costs nothing because arrays are immutable.
In the forward a `Recorder` notes what the recurrent modules read: their inputs, and what their linear layers made
of them. Where only the first rows are accepted, the modules run again on those rows alone, each linear layer giving
the rows that it gave before. Evaluation is lazy, and nothing but the new states is asked for: what is really computed
is convolutions, gates and the recurrence. No weight matrix is read again, and the host does not wait.

No list of families is needed: which modules are recurrent shows in a forward, by their writing a `RecurrentState`.
Only the modules of one model are attached to; other models of the process are left alone.

Letters: N rows of a forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache

from .attach import attached, subclass


class RecurrentState(ArraysCache):  # type: ignore[misc]  # mlx-lm's models ask for that class
    """The arrays that one recurrent layer carries from row to row."""

    branches = False

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.length = 0
        """committed positions"""
        self._kept: list[mx.array | None] = [None] * size
        self._before = list(self._kept)
        """before the last forward, when the text had `_start` positions"""
        self._start = 0
        self._marks: dict[int, list[mx.array | None]] = {}

    def begin(self) -> None:
        """Forget what the last forward left, unless it was committed; the state before the next one is this one."""
        self.cache = list(self._kept)
        self._before, self._start = self._kept, self.length

    def rewind(self) -> None:
        """Take the state from before the last forward, to replay rows of it."""
        self.cache = list(self._before)

    def gather(self, path: mx.array) -> list[mx.array]:
        raise AssertionError("a recurrent state follows one path: rows of a tree cannot be gathered")

    def keep(self, gathered: Sequence[mx.array]) -> None:
        raise AssertionError("a recurrent state follows one path: rows of a tree cannot be gathered")

    def commit(self, length: int) -> None:
        self._kept, self.length = list(self.cache), length

    def mark(self, most: int) -> None:
        """Remember the committed state, to go back to it; of all marks the last `most` are kept."""
        self._marks.pop(self.length, None)
        self._marks[self.length] = self._kept
        for length in list(self._marks)[:-most]:
            del self._marks[length]

    @property
    def marks(self) -> list[int]:
        """Lengths of the text that were marked."""
        return list(self._marks)

    def can_trim_to(self, length: int) -> bool:
        """True where the state at `length` is at hand, without a replay."""
        return length in (self.length, self._start, 0) or length in self._marks

    def trim_to(self, length: int) -> None:
        if length != self.length:
            empty: list[mx.array | None] = [None] * len(self._kept)
            found = self._before if length == self._start else self._marks.get(length, empty)
            self._kept, self.cache, self.length = found, list(found), length
            self._before, self._start = found, length
        for marked in [each for each in self._marks if each > length]:
            del self._marks[marked]

    def arrays(self) -> list[mx.array]:
        return [array for array in self.cache if array is not None]

    def stretch(self, length: int, most: int) -> None:
        """Pretend that the text has `length` positions: a state looks the same after any number of them."""
        self.length = self._start = length


@dataclass
class Call:
    """A call of a recurrent module in a forward of N rows, to be repeated on the first of them."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: dict[int, list[mx.array]] = field(default_factory=dict)
    """what each linear layer gave, by its id, call by call"""


class Recorder:
    """Notes what the recurrent modules of one model read, and runs them again; attached to the model once."""

    def __init__(self) -> None:
        self._calls: list[Call] | None = None  # of the forward under way, where it is recorded
        self._call: Call | None = None  # the module that is running
        self._rows = 0  # of the forward that is replayed, and of them the accepted ones
        self._accepted = 0
        self._done: dict[int, int] = {}  # calls of each linear layer in this replay

    @classmethod
    def of(cls, model: nn.Module, modules: Sequence[nn.Module]) -> Recorder:
        """The recorder of a model whose recurrent modules are `modules`."""
        return attached(model, "_recorder", lambda: cls()._attached(modules))

    def _attached(self, modules: Sequence[nn.Module]) -> Recorder:
        layers = {id(child): child for module in modules for child in module.modules() if is_linear(child)}
        for layer in layers.values():
            self._attach_linear(layer)
        for module in modules:
            self._attach_recurrent(module)
        return self

    def _attach_recurrent(self, module: nn.Module) -> None:
        def call(original: type, this: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if self._calls is None or self._call is not None:  # not recorded, or within another
                return original.__call__(this, *args, **kwargs)
            self._call = Call(this, args, kwargs)
            self._calls.append(self._call)
            try:
                return original.__call__(this, *args, **kwargs)
            finally:
                self._call = None

        subclass(module, __call__=call)

    def _attach_linear(self, layer: nn.Module) -> None:
        def call(original: type, this: nn.Module, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
            if self._call is None or args or kwargs:  # more than rows: run again in a replay
                return original.__call__(this, x, *args, **kwargs)
            outputs = self._call.outputs.setdefault(id(this), [])
            if self._accepted:
                return self._repeated(original, this, x, outputs)
            out: mx.array = original.__call__(this, x)
            outputs.append(out)
            return out

        subclass(layer, __call__=call)

    def _repeated(self, original: type, layer: nn.Module, x: mx.array, outputs: list[mx.array]) -> mx.array:
        """The rows that the layer gave before, for input (1, accepted, K); computed anew for any other one."""
        index = self._done.get(id(layer), 0)
        self._done[id(layer)] = index + 1
        if index < len(outputs) and x.ndim == 3 and x.shape[1] == self._accepted:
            out = outputs[index]
            if out.ndim == 3 and out.shape[1] == self._rows:
                return out[:, : self._accepted]
        return original.__call__(layer, x)

    @contextmanager
    def into(self, calls: list[Call] | None) -> Iterator[None]:
        """Record the forward within into `calls`; None: do not."""
        self._calls = calls
        try:
            yield
        finally:
            self._calls = None

    def replay(self, calls: Sequence[Call], rows: int, accepted: int) -> None:
        """Run the recorded modules on the first `accepted` of `rows` rows; the states were rewound."""
        self._rows, self._accepted = rows, accepted
        try:
            for call in calls:
                self._call, self._done = call, {}
                kwargs = {name: self._first(value) for name, value in call.kwargs.items()}
                call.module(*(self._first(value) for value in call.args), **kwargs)
        finally:
            self._call, self._accepted = None, 0

    def _first(self, value: Any) -> Any:
        """The accepted rows of an input (1, N, ...). A mask says what attention may see, which is not replayed."""
        if not isinstance(value, mx.array):
            return value
        if value.dtype == mx.bool_:
            return None
        is_by_row = value.ndim > 1 and value.shape[:2] == (1, self._rows)
        return value[:, : self._accepted] if is_by_row else value


def is_linear(module: nn.Module) -> bool:
    """True for a module that multiplies rows with a weight matrix, as `nn.Linear` and its packed forms do."""
    weight = module.get("weight")
    is_matrix = isinstance(weight, mx.array) and weight.ndim == 2 and not module.children()
    return is_matrix and not hasattr(module, "as_linear")

"""The interfaces between the decode step, a drafter and the target.

Letters: L beam length counting the root, H hidden size, C context size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx

from redrafter_mlx.kernels import Weight
from redrafter_mlx.tree import Beam, Candidates

Embed = Callable[[mx.array], mx.array]
"""Token ids (...) -> vectors (..., H), scaled as the target scales them."""


@dataclass(frozen=True, slots=True)
class Seen:
    """The inputs of a draft: arrays on the device, whose values the host does not know yet."""

    context: mx.array
    """(C,) of the last committed token"""
    root: mx.array
    """() int32, the token after it, already chosen by the target"""
    noise: mx.array | None
    """(L-1, V) temperature times the target's own noise at the drafted positions; None when greedy"""
    position: mx.array | None = None
    """() int32, position of the root in the text; None where a draft is only timed or replayed"""


@dataclass(frozen=True, slots=True)
class Rows:
    """Consecutive committed positions, shown to a drafter that reads all of them; on the device.

    Those of a step are its accepted path, padded to the tree's height, because the host does not know yet how many of
    them count. The rows after those are void: the next ones that are shown begin behind the last that counted.
    """

    contexts: mx.array
    """(n, C)"""
    tokens: mx.array
    """(n,) int32, the tokens at these positions"""
    start: int
    """the first one's position; all before it have been shown"""
    count: mx.array | None = None
    """() int32, 1 ... n: how many count; None: all"""


class TargetView(Protocol):
    """The part of `redrafter_mlx.target.Target` that a drafter may use."""

    name: str
    hidden_size: int
    vocab_size: int
    dtype: mx.Dtype
    embedding_scale: float

    def watch(self, layers: Sequence[int]) -> None: ...

    def embed(self, tokens: mx.array) -> mx.array: ...

    def output_rows(self, tokens: mx.array | None = None) -> mx.array: ...

    def quantized_rows(self, tokens: mx.array | None = None) -> Weight | None: ...


class TextDrafter(Protocol):
    """A drafter's state for one text."""

    def draft(self, seen: Seen, beam: Beam) -> Candidates:
        """Queue the computation of a draft and return its candidates without waiting for them."""

    def keep(self, tokens: Sequence[int]) -> None:
        """Record the tokens that a step has committed."""


class RowReader(TextDrafter, Protocol):
    """What `start` of a drafter with `needs_rows` returns. It is shown every committed position, in order, before the
    draft of what follows them, and stays with the KV cache of the text's target, so that a later text that begins with
    the same tokens goes on from there.
    """

    drafter: Any
    """the `Drafter` that began it"""

    @property
    def shown(self) -> int:
        """Positions shown without a gap from 0; of the last ones, those that did not count are overwritten."""

    def observe(self, rows: Rows) -> None:
        """Take the rows of a step, or of a part of the prompt; waits for nothing.

        Raises:
            ValueError: they do not begin at a position that was shown, or directly behind the last.
        """

    def trim(self, length: int) -> None:
        """Forget all positions from `length` on."""

    def launch(self) -> None:
        """Set going what is still to be computed, so that another thread can go on with it; see `KVCache.launch`."""


class Drafter(Protocol):
    """A drafter with its weights. A model has one, which all texts share."""

    config: Any
    """a dataclass with `to_dict`, `model_type`, and `target`, the model it was made for"""
    source: str
    """what its tokens are called in statistics, as in `recurrent`"""

    @property
    def needs_text(self) -> bool:
        """True if it drafts after the host has read the accepted path; False if its drafts can be queued before."""

    @property
    def needs_rows(self) -> bool:
        """True: reads the contexts of all committed positions, so `start` returns a `RowReader`."""

    @property
    def max_width(self) -> int:
        """Maximum beam width that it can search."""

    @property
    def max_length(self) -> int | None:
        """Maximum beam length that it can search, the root counted; None for any."""

    @property
    def nbytes(self) -> int:
        """Bytes that one level of a draft reads."""

    def attach(self, target: TargetView) -> None:
        """Set the target to draft for: check sizes, share its weights, optimize the layout of final weights.

        Raises:
            ValueError: it was made for another target.
        """

    def start(self, tokens: Sequence[int]) -> TextDrafter:
        """Begin a text: `tokens` are its prompt."""

    def parameters(self) -> Any:
        """Its weights, as `nn.Module.parameters` returns them."""

    def cost_key(self) -> dict[str, Any]:
        """Properties on which the seconds of a draft depend, for the name of the file of measured costs."""

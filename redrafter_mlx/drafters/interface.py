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

"""A target with its drafters and its tokenizer, as `load` returns it, and what it makes of a `draft` argument."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import mlx.core as mx

from .auto import Auto, Learned, cost_table
from .drafters.interface import Drafter, Seen
from .drafters.lookup import Lookup
from .policy import Fixed, Off, Policy
from .prompts import Prompt, encode_prompt
from .target import Target
from .tree import MAX_NODES, Beam

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

_log = logging.getLogger("redrafter_mlx")


@dataclass(slots=True)
class Model:
    """What `load` returns. Any thread may generate with it; they take turns, step by step."""

    target: Target
    drafter: Drafter | None = None
    tokenizer: TokenizerWrapper | None = None
    eos_token_ids: frozenset[int] = frozenset()
    """Tokens that end an answer; of the tokenizer where there is one."""
    learned: Learned | None = None
    """What `draft="auto"` has learned about target and drafter on this machine."""
    lookup: Lookup | None = None
    """Drafts what has stood in the text before, beside the drafter or without one."""
    lock: threading.RLock = field(default_factory=threading.RLock, repr=False)

    def __post_init__(self) -> None:
        if not self.eos_token_ids and self.tokenizer is not None:
            self.eos_token_ids = frozenset(self.tokenizer.eos_token_ids)
        # What is still to be computed belongs to this thread's stream, and other threads could not compute it.
        mx.eval(self.target.model.parameters())
        if self.drafter is not None:
            seen = Seen(
                mx.zeros((self.target.context_size,), dtype=self.target.dtype),
                mx.array(0, dtype=mx.int32),
                None,
            )
            mx.eval(self.drafter.start([0]).draft(seen, Beam(1, 2, 2)).logprobs, self.drafter.parameters())


def encode(model: Model, prompt: Prompt, raw: bool = False) -> list[int]:
    """Token ids of a prompt: a string (as a user's message unless `raw`), messages, or token ids.

    Raises:
        ValueError: empty, ids outside the vocabulary, or text without a tokenizer or chat template.
    """
    return encode_prompt(model.tokenizer, prompt, raw, model.target.vocab_size, model.target.name)


def make_policy(model: Model, draft: str | Beam, greedy: bool = True) -> Policy:
    """The policy for a `draft` argument: "auto", "off", "WxL", "WxL@N" or a Beam.

    Raises:
        ValueError: none of these, or drafting asked for without a drafter, beyond its size, or in a way that the target
            cannot verify.
    """
    drafter = model.drafter
    nothing_to_draft = drafter is None and model.lookup is None
    if draft == "off" or (draft == "auto" and (nothing_to_draft or not model.target.drafts.chains)):
        return Off()  # where drafts cannot be verified, that was said when the model was loaded
    if nothing_to_draft:
        raise ValueError(
            f"draft={str(draft)!r} needs a drafter, and {model.target.name} was loaded without one"
        )
    if draft == "auto":
        with model.lock:
            if model.learned is None:
                model.learned = Learned(cost_table(model.target, drafter))
            elif model.learned.is_stale and not model.learned.is_second:
                _log.warning(
                    "steps take other times than were measured before: measuring again (some seconds)"
                )
                table = cost_table(model.target, drafter, fresh=True, on_measure=lambda: None)
                model.learned = Learned(table, is_second=True)
        return Auto(model.learned, greedy, drafter, model.target.widest(MAX_NODES))
    beam = draft if isinstance(draft, Beam) else Beam.parse(draft)
    _check_verifiable(model.target, beam)
    if drafter is None:
        return Fixed(beam)
    if beam.width > drafter.max_width:
        raise ValueError(
            f"beam width must be at most the drafter's vocabulary {drafter.max_width}, not {beam.width}"
        )
    if drafter.max_length is not None and beam.length > drafter.max_length:
        raise ValueError(
            f"beam length must be at most {drafter.max_length} with this drafter, not {beam.length}"
        )
    return Fixed(beam)


def _check_verifiable(target: Target, beam: Beam) -> None:
    """Check that what is drafted can be verified.

    Raises:
        ValueError: it cannot; with the reason.
    """
    can = target.drafts
    if not can.chains:
        raise ValueError(f"draft='{beam}': {target.name} verifies no drafts: {can.reason}")
    if beam.width > 1 and not can.branches:
        raise ValueError(
            f"draft='{beam}' is a tree, and {target.name} verifies chains only, as 1x{beam.length}: {can.reason}"
        )

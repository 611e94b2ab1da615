"""The KV cache of a conversation, kept from one turn to the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .drafters.interface import Drafter
from .offers import rows_shown
from .target import Target
from .target.cache import KVCache


@dataclass(slots=True)
class PromptCache:
    """A KV cache that outlives one generation, with the tokens it holds: give it to the next turn.

    It belongs to the first model it is used with, and to one stream at a time.
    """

    tokens: list[int] = field(default_factory=list)
    kv: KVCache | None = None
    target: Target | None = field(default=None, repr=False)
    in_use: bool = False

    def check(self, target: Target, kv_bits: int | None) -> None:
        """Check that the next generation may use it.

        Raises:
            ValueError: it belongs to another model or has other `kv_bits`, or another stream is using it.
        """
        if self.in_use:
            raise ValueError("cache is in use by another stream: finish or close that first")
        if self.target is not None and self.target is not target:
            raise ValueError(f"cache belongs to {self.target.name}, and cannot serve {target.name}")
        if self.kv is not None and self.kv.bits != kv_bits:
            raise ValueError(f"cache has kv_bits {self.kv.bits}, asked for {kv_bits}")

    def reuse(self, prompt: Sequence[int], drafter: Drafter | None = None) -> int:
        """Cut the cache back to the longest prefix that it shares with `prompt` and can go back to; returns its length.

        At least one prompt token is left to process: the drafter needs the hidden state of the last one. One that reads
        the rows of all positions needs those it has not been shown, because it was off in an earlier turn, once more.
        """
        if self.kv is None:
            return 0
        shared = 0
        for mine, theirs in zip(self.tokens, prompt[:-1], strict=False):
            if mine != theirs:
                break
            shared += 1
        depends_on_cut = self.target is not None and self.target.depends_on_cut
        shared = 0 if depends_on_cut else self.kv.reach(min(shared, rows_shown(drafter, self.kv)))
        if not self.kv.can_trim_to(shared):
            self.kv, self.tokens = None, []
            return 0
        self.kv.trim(self.kv.length - shared)
        del self.tokens[shared:]
        return shared

    def store(self, kv: KVCache, tokens: list[int]) -> None:
        """Leave the cache with exactly the tokens that were given or emitted, also after an interruption; empty where
        the next thread could not go on with it.
        """
        self.in_use = False
        kept = kv.reach(min(kv.length, len(tokens)))
        if not kv.can_trim_to(kept):
            self.kv, self.tokens = None, []
            return
        try:
            kv.trim(kv.length - kept)
            kv.mark()  # a turn's boundary, where a conversation may be taken up again
            kv.launch()
        except RuntimeError:  # closed in another thread than the one that read the stream
            self.kv, self.tokens = None, []
            return
        self.kv, self.tokens = kv, tokens[: kv.length]

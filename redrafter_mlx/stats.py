"""What a generation did: tokens, steps, acceptance, time and memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

_SUMMED = (
    "generated_tokens", "decoded_tokens", "steps", "drafted_tokens", "accepted_tokens", "syncs",
    "prefill_seconds", "decode_seconds",
)  # fmt: skip


_NONE: Mapping[str, int] = {}


@dataclass(slots=True)
class Stats:
    """Figures of one generation, or with `add` of several. Times are in seconds, memory in bytes."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    """Tokens of the prompt that were in the KV cache already."""
    generated_tokens: int = 0
    token_ids: list[int] = field(default_factory=list)
    decoded_tokens: int = 0
    """Generated tokens but the first of a text, which belongs to the prefill."""
    steps: int = 0
    """Target forwards after the prefill."""
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    accepted_by_depth: list[int] = field(default_factory=list)
    """Entry d: steps in which at least d+1 draft tokens were accepted."""
    drafted_by_source: dict[str, int] = field(default_factory=dict)
    """Rows verified by what drafted them; what two have drafted is the lookup's."""
    accepted_by_source: dict[str, int] = field(default_factory=dict)
    syncs: int = 0
    """Times the host waited for the device after the prefill."""
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    """Time spent in decode steps; what the caller does between two chunks is not counted."""
    peak_memory_bytes: int = 0
    seed: int | None = None
    finish_reason: str | None = None
    """"stop" or "length"; None while running."""

    @property
    def tokens_per_step(self) -> float:
        """Acceptance length: tokens that a step yields, the next token included."""
        return self.decoded_tokens / self.steps if self.steps else 0.0

    @property
    def acceptance(self) -> tuple[float, ...]:
        """Share of steps in which at least 1, 2, ... draft tokens were accepted."""
        return tuple(count / self.steps for count in self.accepted_by_depth)

    @property
    def tokens_per_second(self) -> float:
        """Speed of decoding alone; the first token belongs to the prefill."""
        return self.decoded_tokens / self.decode_seconds if self.decode_seconds else 0.0

    def observe(
        self, nodes: int, num_tokens: int, sources: Sequence[str] = (), rows: Mapping[str, int] = _NONE
    ) -> None:
        """Count a step.

        Args:
            nodes: rows verified, the root included.
            num_tokens: tokens that it brought, the next token included.
            sources: what drafted each accepted token.
            rows: verified rows but the root by what drafted them.
        """
        num_accepted = max(0, num_tokens - 1)
        for source, count in rows.items():
            self.drafted_by_source[source] = self.drafted_by_source.get(source, 0) + count
        for source in sources[:num_accepted]:
            self.accepted_by_source[source] = self.accepted_by_source.get(source, 0) + 1
        self.steps += 1
        self.decoded_tokens += num_tokens
        self.drafted_tokens += nodes - 1
        self.accepted_tokens += num_accepted
        self.accepted_by_depth += [0] * (num_accepted - len(self.accepted_by_depth))
        for depth in range(num_accepted):
            self.accepted_by_depth[depth] += 1

    def add(self, other: Stats) -> None:
        """Count the steps of another generation too."""
        for name in _SUMMED:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        both = zip_longest(self.accepted_by_depth, other.accepted_by_depth, fillvalue=0)
        self.accepted_by_depth = [mine + theirs for mine, theirs in both]
        for name in ("drafted_by_source", "accepted_by_source"):
            mine = getattr(self, name)
            for source, count in getattr(other, name).items():
                mine[source] = mine.get(source, 0) + count
        self.peak_memory_bytes = max(self.peak_memory_bytes, other.peak_memory_bytes)

    def to_dict(self) -> dict[str, object]:
        """All fields, and the figures that follow from them, as JSON values."""
        values: dict[str, object] = {name: getattr(self, name) for name in self.__slots__}
        values["tokens_per_step"] = round(self.tokens_per_step, 4)
        values["tokens_per_second"] = round(self.tokens_per_second, 3)
        return values

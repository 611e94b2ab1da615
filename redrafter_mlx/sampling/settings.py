"""The settings of sampling, checked when they are created."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

COLDEST = 1e-6
"""Below this temperature the most probable token is taken: dividing by less would overflow."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the target's token is chosen. Temperature 0 takes the most probable one."""

    temperature: float = 0.0
    """0 or more; below 1e-6 it counts as 0."""
    top_p: float = 1.0
    """Keep the most probable tokens up to this mass, at least one; 1 keeps all."""
    top_k: int = 0
    """Keep this many; 0 keeps all."""
    min_p: float = 0.0
    """Keep tokens of at least this share of the most probable one's probability."""
    seed: int | None = None
    """0 to 2**64 - 1; None: a fresh one, which `stats.seed` reports."""
    repetition_penalty: float = 1.0
    """Divide positive logits of tokens seen in prompt or text by this, multiply negative ones; 1 is off."""
    presence_penalty: float = 0.0
    """Subtract from the logits of tokens already generated."""
    frequency_penalty: float = 0.0
    """Subtract from the logits of tokens already generated, once for each time."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Token id -> what is added to its logit. Ids may be strings, which JSON's keys are."""

    def __post_init__(self) -> None:
        def check(name: str, rule: str, ok: bool) -> None:
            if not ok:
                raise ValueError(f"{name} must be {rule}, not {getattr(self, name)!r}")

        def within(name: str, low: float, high: float) -> bool:
            value = getattr(self, name)
            return _is_number(value) and low <= value <= high

        check("temperature", "a number, 0 or more", within("temperature", 0, _HUGE))
        check("top_p", "between 0 and 1", within("top_p", 0, 1))
        check("top_k", "an integer, 0 or more", _is_integer(self.top_k) and self.top_k >= 0)
        check("min_p", "between 0 and 1", within("min_p", 0, 1))
        seed_ok = self.seed is None or (_is_integer(self.seed) and 0 <= self.seed < 2**64)
        check("seed", "an integer, 0 to 2**64 - 1", seed_ok)
        check("repetition_penalty", "a number above 0", within("repetition_penalty", 1e-30, _HUGE))
        for name in ("presence_penalty", "frequency_penalty"):
            check(name, "a number", within(name, -_HUGE, _HUGE))
        for name in ("temperature", "top_p", "min_p", *_PENALTIES):
            object.__setattr__(self, name, float(getattr(self, name)))
        object.__setattr__(self, "logit_bias", _checked_bias(self.logit_bias))

    @property
    def is_greedy(self) -> bool:
        return self.temperature < COLDEST

    @property
    def has_penalties(self) -> bool:
        penalties = (self.repetition_penalty - 1, self.presence_penalty, self.frequency_penalty)
        return any(penalties) or bool(self.logit_bias)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Check the ids of `logit_bias` against the target's vocabulary.

        Raises:
            ValueError: names a token that the target does not have.
        """
        for token in self.logit_bias:
            if not 0 <= token < vocab_size:
                raise ValueError(f"logit_bias must name tokens in 0..{vocab_size - 1}, not {token}")

    def seeded(self) -> Sampling:
        """These settings with a seed: a random one where it is None."""
        return self if self.seed is not None else replace(self, seed=secrets.randbits(32))


_HUGE = 1e30  # larger values overflow float32 on the way
_PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")


def _is_number(value: object) -> bool:
    is_real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_real and abs(value) <= _HUGE  # type: ignore[arg-type]


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _checked_bias(bias: object) -> dict[int, float]:
    if not isinstance(bias, Mapping):
        raise ValueError(f"logit_bias must map token ids to numbers, not {bias!r}")
    checked = {}
    for token, value in bias.items():
        number = int(token) if isinstance(token, str) and token.strip().isdecimal() else token
        if not _is_integer(number):
            raise ValueError(f"logit_bias must have token ids as keys, not {token!r}")
        if not _is_number(value) or abs(value) > _HUGE:
            raise ValueError(f"logit_bias of token {token} must be a number, not {value!r}")
        checked[int(number)] = float(value)
    return checked

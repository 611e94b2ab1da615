"""Whether a drafter pays on this machine: it decodes held-out questions with and without it, in turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from redrafter_mlx.device import on_gpu
from redrafter_mlx.drafters.kinds import load_recurrent
from redrafter_mlx.drafters.precision import choose_precision
from redrafter_mlx.generation import Model
from redrafter_mlx.measure.compare import compare, own_arm
from redrafter_mlx.sampling import Sampling

from .corpus import HELD_OUT_EVERY
from .prompts import is_held_out, tokenize
from .shards import read_shard

PLAIN, DRAFTED = "off", "auto"
QUESTIONS, TOKENS = 4, 48
"""What a drafter is judged on; one question more warms up."""
COST_TABLE_SECONDS = 10.0
"""To measure what drafting costs, as the first use of a drafter on a machine does."""


def judge_seconds(token_seconds: float) -> float:
    """What `judge` takes, about.

    Args:
        token_seconds: of decoding a token plainly.
    """
    return COST_TABLE_SECONDS + 2 * (QUESTIONS + 1) * TOKENS * token_seconds


@dataclass(frozen=True, slots=True)
class Verdict:
    """A drafter against plain decoding, T = 0, all questions together."""

    plain: float
    """Tokens per second without a draft."""
    drafted: float
    """Tokens per second with `--draft auto`."""
    tokens_per_step: float
    questions: int
    is_same: bool
    """True if both wrote the same tokens."""

    @property
    def speed_up(self) -> float:
        return self.drafted / self.plain if self.plain else 0.0


def held_out_questions(shards: Sequence[Path], limit: int = QUESTIONS) -> list[str]:
    """Up to `limit` questions that were not trained on; of those that were, if none was held out."""
    held: list[str] = []
    others: list[str] = []
    for path in shards:
        for prompt in read_shard(path)[0].prompts:
            (held if is_held_out(prompt, HELD_OUT_EVERY) else others).append(prompt)
    return (held or others)[:limit]


def judge(model: Model, drafter: Path, questions: Sequence[str], max_tokens: int = TOKENS) -> Verdict:
    """Decode every question both ways.

    Args:
        model: the target as loaded for writing, without a drafter.
    """
    target = model.target
    loaded = load_recurrent(drafter, target.dtype if on_gpu() else mx.float32)
    loaded.attach(target)
    choose_precision(loaded, target)
    both = Model(target, loaded, model.tokenizer, model.eos_token_ids)
    prompts = [tokenize(model.tokenizer, [{"role": "user", "content": text}]) for text in questions]
    arms = {name: own_arm(both, name, max_tokens, Sampling(0.0)) for name in (PLAIN, DRAFTED)}
    for comparison in compare(arms, prompts, ["all"] * len(prompts)):
        result = comparison
    runs = result.runs[DRAFTED]
    steps = sum(run.stats.steps for run in runs if run.stats is not None)
    tokens = sum(len(run.token_ids) - 1 for run in runs)
    same = all(a.token_ids == b.token_ids for a, b in zip(result.runs[PLAIN], runs, strict=True))
    return Verdict(result.total(PLAIN), result.total(DRAFTED), tokens / max(1, steps), len(prompts), same)

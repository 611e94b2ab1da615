"""Which of mlx-lm's model families are decoded exactly, and how: with trees, with chains, or not at all.

Every module of `mlx_lm.models` is built tiny, with random weights (`families`). Its plain text must be that of mlx-lm's
own `generate_step`, and its drafted texts must be its plain text: greedy and sampled, after short prompts and after
some that are far longer than its windows and chunks, in a first turn and in turns on a kept prompt cache, one of which
goes back. Drafts are right 60 % of the time (`often_right`), so that scattered paths are kept.
Run: python -m benchmarks.coverage [--families llama qwen3_5] [--seeds 2] [--write]. Exit 1 if anything is wrong;
`--write` puts the result into benchmarks/results/coverage.json and the table into docs/models.md.
"""

from __future__ import annotations

import redrafter_mlx as rd  # before mlx

# isort: split
import argparse
import json
import logging
import sys
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import generate_step

from redrafter_mlx.generation import Model, PromptCache
from redrafter_mlx.measure.machine import machine
from redrafter_mlx.sampling import Sampler
from redrafter_mlx.target import Target
from redrafter_mlx.target.cache import KVCache
from redrafter_mlx.target.keys_values import ChunkedKeysValues, KeysValues

from .families import SEQUENCE, build, names
from .often_right import OftenRight
from .ties import TIE, first_difference, gap

TREES = ("1x4", "3x4@8", "8x5@16")
CHAINS = ("1x4", "1x6")
SETTINGS = {"T = 0": rd.Sampling(), "T = 0.8": rd.Sampling(temperature=0.8, seed=11)}
PROMPTS = (5, 150)
TOKENS = 32
RESULTS = Path(__file__).parent / "results" / "coverage.json"
DOCS = Path(__file__).parent.parent / "docs" / "models.md"
BEGIN, END = "<!-- begin: python -m benchmarks.coverage --write -->", "<!-- end -->"


@dataclass
class Coverage:
    """What was found for a family."""

    family: str
    exact: str = ""
    """"tree", "chain", or "": refused"""
    reason: str = ""
    """why not more"""
    layers: str = ""
    """what the layers keep"""
    wrong: list[str] = field(default_factory=list)
    """texts that differ and are no ties"""
    ties: int = 0
    texts: int = 0
    accepted: int = 0
    scattered: int = 0
    """drafted steps of which other rows than the first were kept"""
    reused: int = 0
    """prompt tokens that a turn found in its cache"""

    @property
    def is_sound(self) -> bool:
        """False where a text is wrong, or where drafts were verified and nothing was ever accepted."""
        return not self.wrong and (not self.exact or self.accepted > 0)


def examine(family: str, seed: int = 0, texts: tuple[int, ...] = PROMPTS) -> Coverage:
    """Build a family and compare all its texts."""
    found = Coverage(family)
    try:
        model, reference = build(family, seed), build(family, seed)
        target = Target(model, family, max_length=2048)
    except (ImportError, ValueError) as error:
        found.reason = str(error)
        return found
    found.layers = _layers(target)
    target.check_tree()
    can = target.drafts
    found.exact, found.reason = "tree" if can.branches else "chain" if can.chains else "", can.reason
    _Compared(found, target, reference, seed).run(texts)
    return found


class _Compared:
    """The texts of one family."""

    def __init__(self, found: Coverage, target: Target, reference: nn.Module, seed: int) -> None:
        self.found, self.target, self.reference = found, target, reference
        self.rng = np.random.default_rng(seed)
        self.model = Model(target, OftenRight(SEQUENCE))
        self.drafts = TREES if target.drafts.branches else CHAINS if target.drafts.chains else ()

    def run(self, prompts: tuple[int, ...]) -> None:
        for length in prompts:
            prompt = self.tokens(length)
            for setting, sampling in SETTINGS.items():
                where = f"{length} tokens of prompt, {setting}"
                want = _mlx_lm(self.reference, prompt, sampling, self.target.vocab_size)
                plain = self.text(prompt, sampling, "off")
                self.compare(f"{where}: plain against mlx-lm", prompt, sampling, plain, want)
                for draft in self.drafts:
                    mine = self.text(prompt, sampling, draft, plain)
                    self.compare(f"{where}: {draft}", prompt, sampling, mine, plain)
                self.turns(where, prompt, sampling)

    def turns(self, where: str, prompt: list[int], sampling: rd.Sampling) -> None:
        """A conversation on one prompt cache: on, back into the prompt, and on again."""
        cache = PromptCache()
        draft = self.drafts[-1] if self.drafts else "off"
        said = prompt
        for turn in ("first", "second", "going back", "after that"):
            plain = self.text(said, sampling, "off")
            mine = self.text(said, sampling, draft, plain, cache)
            self.compare(f"{where}: {draft}, {turn} turn", said, sampling, mine, plain)
            said = [*said, *mine[: TOKENS - 3], *self.tokens(4)]
            if turn == "second":
                said = [*said[: len(prompt) + 5], *self.tokens(3)]

    def tokens(self, count: int) -> list[int]:
        drawn: list[int] = self.rng.integers(1, SEQUENCE, count).tolist()
        return drawn

    def text(
        self, prompt: list[int], sampling: rd.Sampling, draft: str, truth: list[int] | None = None,
        cache: PromptCache | None = None,
    ) -> list[int]:  # fmt: skip
        """The answer; `truth` is what the drafter believes it to be."""
        assert isinstance(self.model.drafter, OftenRight)
        self.model.drafter.follow([*prompt, *(truth or [])], len(prompt))
        cache = PromptCache() if cache is None else cache
        keep = KVCache.keep

        def counted(kv: KVCache, path: Sequence[int]) -> None:
            self.found.scattered += list(path) != list(range(len(path)))
            keep(kv, path)

        with mock.patch.object(KVCache, "keep", counted):
            stats = self._generated(prompt, sampling, draft, cache)
        self.found.accepted += stats.accepted_tokens
        self.found.reused += stats.reused_tokens
        return stats.token_ids

    def _generated(
        self, prompt: list[int], sampling: rd.Sampling, draft: str, cache: PromptCache
    ) -> rd.Stats:
        _, stats = rd.generate(
            self.model, prompt, max_tokens=TOKENS, sampling=sampling, draft=draft, cache=cache
        )
        return stats

    def compare(
        self, what: str, prompt: list[int], sampling: rd.Sampling, mine: list[int], want: list[int]
    ) -> None:
        self.found.texts += 1
        index = first_difference(mine, want)
        if index is None:
            return
        distance = gap(self.reference, [*prompt, *want[:index]], sampling, self.target.vocab_size)
        if distance < TIE:
            self.found.ties += 1
        else:
            self.found.wrong.append(
                f"{what}: differs at token {index}, where the best two are {distance:.2g} apart"
            )


def _mlx_lm(model: nn.Module, prompt: list[int], sampling: rd.Sampling, vocab: int) -> list[int]:
    """mlx-lm's own text, with the noise of ours."""
    sampler = Sampler(sampling, vocab, prompt)
    drawn: list[int] = []

    def choose(logprobs: mx.array) -> mx.array:
        position = len(prompt) + len(drawn)
        drawn.append(0)
        return sampler.first(logprobs, sampler.noise(mx.array([position], dtype=mx.int32), position, 1))

    steps = generate_step(mx.array(prompt), model, max_tokens=TOKENS, sampler=choose)
    return [int(token) for token, _ in steps]


def _layers(target: Target) -> str:
    """What a model's layers keep, as in "2 x recurrent state, 2 x window"."""
    kinds: Counter[str] = Counter()
    for state in target.new_cache().states:
        if isinstance(state, ChunkedKeysValues):
            kinds["chunk"] += 1
        elif isinstance(state, KeysValues):
            kinds["window" if state.window else "keys and values"] += 1
        else:
            kinds["recurrent state"] += 1
    return ", ".join(f"{count} x {kind}" for kind, count in sorted(kinds.items()))


def _merged(results: list[Coverage]) -> Coverage:
    """One result of those of several seeds."""
    first = results[0]
    for other in results[1:]:
        if (other.exact, bool(other.reason)) != (first.exact, bool(first.reason)):
            first.wrong.append(f"exact as {other.exact!r} with another seed: {other.reason}")
        first.wrong += other.wrong
        for name in ("ties", "texts", "accepted", "scattered", "reused"):
            setattr(first, name, getattr(first, name) + getattr(other, name))
    return first


def summary(results: list[Coverage]) -> dict[str, int]:
    """How many families are what."""
    return {
        "families": len(results), "tree": sum(r.exact == "tree" for r in results),
        "chain": sum(r.exact == "chain" for r in results), "refused": sum(not r.exact for r in results),
        "wrong": sum(not r.is_sound for r in results), "texts": sum(r.texts for r in results),
        "ties": sum(r.ties for r in results), "accepted": sum(r.accepted for r in results),
        "scattered": sum(r.scattered for r in results), "reused": sum(r.reused for r in results),
    }  # fmt: skip


def table(results: list[Coverage]) -> str:
    """The table of docs/models.md."""
    lines = ["| module of `mlx_lm.models` | layers keep | drafts | why not trees |", "|---|---|---|---|"]
    words = {"tree": "trees", "chain": "chains", "": "none"}
    lines += [f"| {r.family} | {r.layers} | {words[r.exact]} | {r.reason} |" for r in results]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", nargs="+", default=names(), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="into benchmarks/results and docs/models.md")
    arguments = parser.parse_args()
    logging.getLogger("redrafter_mlx").setLevel(logging.ERROR)
    results = []
    for family in arguments.families:
        try:
            found = _merged([examine(family, seed) for seed in range(arguments.seeds)])
        except Exception as error:  # noqa: BLE001  (a crash is a result)
            last = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(last.filename).name}:{last.lineno}"
            found = Coverage(family, wrong=[f"{type(error).__name__}: {error} ({place})"])
        results.append(found)
        said = found.exact or "refused"
        print(
            f"{family:24} {said:8} {found.texts:4} texts {found.accepted:6} accepted  {found.reason}",
            file=sys.stderr,
        )
        for line in found.wrong:
            print(f"    WRONG {line}", file=sys.stderr)
    counts = summary(results)
    if arguments.write:
        report = {**machine(), "seeds": arguments.seeds, **counts, "by_family": [asdict(r) for r in results]}
        RESULTS.write_text(json.dumps(report, indent=1) + "\n")
        before, rest = DOCS.read_text().split(BEGIN)
        DOCS.write_text(f"{before}{BEGIN}\n\n{table(results)}\n\n{END}{rest.split(END)[1]}")
    print(json.dumps({**machine(), **counts}))
    sys.exit(counts["wrong"] > 0)


if __name__ == "__main__":
    main()

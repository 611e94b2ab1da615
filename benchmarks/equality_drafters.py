"""The promise, whatever drafts: the same text by drafters that guess at random, that are often right, and that lie.

By default on tiny models of every family; with --model on a real one. Every prompt is decoded plainly, then drafted
with a random drafter, with one that is often right (the model's own where it has one), and with an adversary: its
candidates are a mixture of the right tokens and wrong ones, with equal siblings everywhere and made-up probabilities.
And with what is looked up in the text: alone, merged with the drafter's, and lies merged with the adversary's.
Float32; greedy, T = 0.7 with filters, T = 1, and penalties. A difference is explained where the target's two best
tokens lie closer than rounding: then both of their scores are shown.
Run: python -m benchmarks.equality_drafters [--tokens 100000] [--model M] [--results F]. Exit 1 on any unexplained
difference; the last line is one JSON object.
"""

from __future__ import annotations

import redrafter_mlx as rd  # before mlx

# isort: split
import argparse
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import mlx.core as mx
import numpy as np

from redrafter_mlx.decode import Text, decode, prefill
from redrafter_mlx.drafters.interface import Drafter, Seen
from redrafter_mlx.drafters.lookup import Lookup, Offer, Rates, TextLookup
from redrafter_mlx.drafters.recurrent import RecurrentDrafter
from redrafter_mlx.files import new_file
from redrafter_mlx.generation import encode
from redrafter_mlx.measure.compare import MT_BENCH
from redrafter_mlx.measure.divergence import divergence
from redrafter_mlx.measure.machine import machine
from redrafter_mlx.policy import Fixed, Off
from redrafter_mlx.prompts import read_requests
from redrafter_mlx.target import Target
from redrafter_mlx.tree import Beam, Candidates
from tests.toy import FAMILIES, VOCAB, make_drafter, make_often_right, make_target

SETTINGS = {
    "T = 0": rd.Sampling(),
    "T = 0.7, filters": rd.Sampling(temperature=0.7, top_p=0.9, top_k=20, min_p=0.02, seed=3),
    "T = 1": rd.Sampling(temperature=1.0, seed=5),
    "T = 0.9, penalties": rd.Sampling(
        temperature=0.9, seed=7, repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.1
    ),
}
DRAFTS = ("1x2", "1x5", "3x4", "8x5@16", "4x5@17")
LENGTH = {"tiny": 200, "real": 96}  # tokens of one text


@dataclass(frozen=True)
class Case:
    """A prompt for a target, and the drafter that is often right on it."""

    name: str
    target: Target
    prompt: list[int]
    often_right: Drafter
    length: int


class Adversary(RecurrentDrafter):
    """Offers what the plain text says, mixed with lies: wrong tokens, the same token in several siblings, and
    probabilities that mean nothing. Ids are always the target's: others are refused when a drafter is loaded.
    """

    def follow(self, truth: Sequence[int], seed: int) -> None:
        """The plain text by absolute position."""
        self._truth = mx.array([*truth, *[0] * 16], dtype=mx.int32)
        self._rng = np.random.default_rng(seed)

    def draft(self, seen: Seen, beam: Beam) -> Candidates:
        assert seen.position is not None
        width, height, rng = beam.width, beam.length - 1, self._rng
        size = width * height
        level = np.arange(size) // width
        parents = np.where(level == 0, -1, (level - 1) * width + rng.integers(0, width, size))
        right = self._truth[seen.position + 1 + mx.array(level)]
        wrong = mx.array(rng.integers(0, self.config.vocab_size, size))
        lies = mx.array(rng.random(size) < 0.3)
        tokens = mx.where(lies, wrong, right).astype(mx.int32)
        logprobs = -np.arange(size) * 0.01 - rng.random(size) * 0.005
        return Candidates(
            tokens, mx.array(parents.astype(np.int32)), mx.array(logprobs.astype(np.float32)), height
        )


class LyingLookup(Lookup):
    """Finds made-up trees of tokens of the text, siblings with equal tokens included, and is sure of them."""

    def start(self, tokens: Sequence[int], greedy: bool = True) -> TextLookup:
        return _Lies(tokens, self.rates[greedy])


class _Lies(TextLookup):
    def __init__(self, tokens: Sequence[int], rates: Rates) -> None:
        super().__init__(tokens, rates)
        self._said, self._rng = list(tokens), np.random.default_rng(len(tokens))

    def keep(self, tokens: Sequence[int]) -> None:
        self._said += tokens

    def offer(self, beam: Beam) -> Offer | None:
        size = int(self._rng.integers(0, 12))
        parents = [int(self._rng.integers(-1, index)) if index else -1 for index in range(size)]
        depths: list[int] = []
        for parent in parents:
            depths.append(1 if parent < 0 else depths[parent] + 1)
        tokens = [self._said[int(at)] for at in self._rng.integers(0, len(self._said), size)]
        probs = [0.95**depth for depth in depths]
        return Offer(tokens, parents, probs, max(depths)) if size else None


def decoded(
    case: Case, drafter: Drafter | None, draft: str, sampling: rd.Sampling, lookup: Lookup | None = None
) -> tuple[list[int], int]:
    """The text, and how many draft tokens were accepted in it."""
    policy = Off() if draft == "off" else Fixed(Beam.parse(draft))
    cache = case.target.new_cache()
    text = Text(
        case.target, drafter, cache, policy, sampling, case.prompt, lookup=lookup, max_tokens=case.length
    )
    tokens = [prefill(case.target, text, case.prompt)]
    for gained in decode(case.target, text):
        tokens += gained
    return tokens, text.stats.accepted_tokens


def adversary(target: Target, truth: list[int], seed: int) -> Adversary:
    made = Adversary(make_drafter(target, head="factored").config)
    made.attach(target)
    made.follow(truth, seed)
    return made


def tiny_cases() -> Iterator[list[Case]]:
    """Endless rounds of a random prompt for every family."""
    targets = {family: make_target(family) for family in FAMILIES}
    for seed in itertools.count():
        rng = np.random.default_rng(seed)
        yield [
            Case(
                family, target, rng.integers(0, VOCAB, int(rng.integers(1, 40))).tolist(),
                make_often_right(target), LENGTH["tiny"],
            )
            for family, target in targets.items()
        ]  # fmt: skip


def real_cases(name: str) -> Iterator[list[Case]]:
    """Endless rounds of one question of MT-bench."""
    model = rd.load(name, dtype="float32")
    often_right = model.drafter or make_often_right(model.target)
    for request in itertools.cycle(read_requests(MT_BENCH)):
        yield [Case(name, model.target, encode(model, request.prompt), often_right, LENGTH["real"])]


@dataclass
class Count:
    """What has been compared so far."""

    rounds: int = 0
    tokens: int = 0
    accepted: int = 0
    models: list[str] = field(default_factory=list)
    differences: list[dict[str, object]] = field(default_factory=list)

    @property
    def unexplained(self) -> int:
        return sum(not each["tie"] for each in self.differences)

    def compare(self, case: Case, setting: str) -> None:
        """Decode a case with one setting plainly and with every drafter, and note where the texts part."""
        sampling, target, turn = SETTINGS[setting], case.target, self.rounds
        plain, _ = decoded(case, None, "off", sampling)
        liar = adversary(target, [*case.prompt, *plain], turn)
        drafters: dict[str, tuple[Drafter | None, Lookup | None]] = {
            "random": (make_drafter(target, seed=turn, head="factored"), None),
            "often right": (case.often_right, None),
            "adversary": (liar, None),
            "lookup": (None, Lookup()),
            "often right, lookup": (case.often_right, Lookup()),
            "adversary, lying lookup": (liar, LyingLookup()),
        }
        for number, (kind, (drafter, lookup)) in enumerate(drafters.items()):
            if drafter is not None:
                drafter.attach(target)  # the others may have made it watch other layers
            draft = DRAFTS[(turn + number) % len(DRAFTS)]
            mine, accepted = decoded(case, drafter, draft, sampling, lookup)
            self.tokens, self.accepted = self.tokens + len(mine), self.accepted + accepted
            found = divergence(target, sampling, case.prompt, plain, mine)
            if found is not None:
                self.differences.append({
                    "model": case.name, "setting": setting, "drafter": kind, "draft": draft, "token": found.index,
                    "tokens": found.tokens, "best": found.best, "scores": found.scores, "tie": found.is_tie,
                })  # fmt: skip

    def report(self) -> str:
        """One line of JSON, from which `resumed` goes on."""
        settings = {"settings": list(SETTINGS), "drafts": DRAFTS}
        return json.dumps({**machine(), **settings, **asdict(self), "unexplained": self.unexplained})


def resumed(path: Path) -> Count:
    """The count of an earlier run that was cut off."""
    values = json.loads(path.read_text())
    return Count(**{each.name: values[each.name] for each in fields(Count)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=100_000, help="drafted tokens to compare, at least")
    parser.add_argument("--model", help="a real model in place of the tiny ones")
    parser.add_argument("--results", type=Path, help="file for the JSON after every round; goes on from it")
    arguments = parser.parse_args()
    path: Path | None = arguments.results
    count = resumed(path) if path is not None and path.exists() else Count()
    rounds = real_cases(arguments.model) if arguments.model else tiny_cases()
    for cases in itertools.islice(rounds, count.rounds, None):
        if count.tokens >= arguments.tokens:
            break
        for case in cases:
            for setting in SETTINGS:
                count.compare(case, setting)
        count.rounds += 1
        count.models = sorted({*count.models, *(case.name for case in cases)})
        progress = (
            f"{count.tokens} tokens, {count.accepted} drafted and accepted, {len(count.differences)} differ"
        )
        print(progress, file=sys.stderr, flush=True)
        if path is not None:
            with new_file(path) as temporary:
                temporary.write_text(count.report() + "\n")
    print(count.report())
    sys.exit(count.unexplained > 0)


if __name__ == "__main__":
    main()

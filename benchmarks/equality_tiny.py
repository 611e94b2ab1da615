"""The promise on tiny models of every family: the same text whatever is drafted, also by drafters that lie.

Every family decodes plainly and drafted with a random drafter, with one that is often right, and with an adversary: its
candidates are a mixture of the right tokens and wrong ones, with equal siblings everywhere and made-up probabilities.
Float32; greedy, T = 0.7 with filters, T = 1, and penalties. A difference is explained where the two best tokens of the
target lie closer than rounding: then both logits are shown.
Run: python -m benchmarks.equality_tiny [--tokens 100000]. Exit 1 on any unexplained difference; the last line is one
JSON object.
"""

from __future__ import annotations

import redrafter_mlx as rd  # before mlx

# isort: split
import argparse
import json
import sys
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from redrafter_mlx.decode import Text, decode, prefill
from redrafter_mlx.drafters.interface import Drafter, Seen
from redrafter_mlx.drafters.recurrent import RecurrentDrafter
from redrafter_mlx.measure.machine import machine
from redrafter_mlx.policy import Fixed, Off
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
TEXT = 200  # tokens of one text
TIE = 1e-4  # logits closer than this may be rounded to either order


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
        wrong = mx.array(rng.integers(0, VOCAB, size))
        lies = mx.array(rng.random(size) < 0.3)
        tokens = mx.where(lies, wrong, right).astype(mx.int32)
        logprobs = -np.arange(size) * 0.01 - rng.random(size) * 0.005
        return Candidates(
            tokens, mx.array(parents.astype(np.int32)), mx.array(logprobs.astype(np.float32)), height
        )


def said(
    target: Target, drafter: Drafter | None, draft: str, sampling: rd.Sampling, prompt: list[int]
) -> tuple[list[int], int]:
    """The text, and how many draft tokens were accepted in it."""
    policy = Off() if draft == "off" else Fixed(Beam.parse(draft))
    text = Text(target, drafter, target.new_cache(), policy, sampling, prompt, max_tokens=TEXT)
    tokens = [prefill(target, text, prompt)]
    for gained in decode(target, text):
        tokens += gained
    return tokens, text.stats.accepted_tokens


def adversary(target: Target, truth: list[int], seed: int) -> Adversary:
    made = make_drafter(target)
    liar = Adversary(made.config)
    liar.attach(target)
    liar.follow(truth, seed)
    return liar


def tie(target: Target, text: list[int], index: int) -> list[float]:
    """The two best logits where a greedy text parts from another one."""
    logits = target.model(mx.array([text[:index]]))[0, -1]
    return [round(value, 7) for value in np.sort(np.array(logits))[-2:].tolist()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=100_000, help="drafted tokens to compare, at least")
    arguments = parser.parse_args()
    compared, accepted, rounds = 0, 0, 0
    differences: list[dict[str, object]] = []
    targets = {family: make_target(family) for family in FAMILIES}
    while compared < arguments.tokens:
        rng = np.random.default_rng(rounds)
        for family, target in targets.items():
            prompt = rng.integers(0, VOCAB, int(rng.integers(1, 40))).tolist()
            for setting, sampling in SETTINGS.items():
                plain, _ = said(target, None, "off", sampling, prompt)
                drafters = {
                    "random": make_drafter(target, seed=rounds),
                    "often right": make_often_right(target),
                    "adversary": adversary(target, [*prompt, *plain], rounds),
                }
                for number, (kind, drafter) in enumerate(drafters.items()):
                    draft = DRAFTS[(rounds + number) % len(DRAFTS)]
                    mine, count = said(target, drafter, draft, sampling, prompt)
                    compared, accepted = compared + len(mine), accepted + count
                    if mine == plain:
                        continue
                    index = next(
                        i for i, pair in enumerate(zip(mine, plain, strict=False)) if pair[0] != pair[1]
                    )
                    best = tie(target, [*prompt, *plain], len(prompt) + index)
                    differences.append({
                        "family": family, "setting": setting, "drafter": kind, "draft": draft, "token": index,
                        "two best logits": best, "tie": sampling.is_greedy and best[1] - best[0] < TIE,
                    })  # fmt: skip
        rounds += 1
        print(
            f"{compared} tokens, {accepted} drafted and accepted, {len(differences)} differ", file=sys.stderr
        )
    unexplained = sum(not each["tie"] for each in differences)
    print(json.dumps({
        **machine(), "tokens": compared, "accepted": accepted, "families": len(targets), "differences": differences,
        "unexplained": unexplained,
    }))  # fmt: skip
    sys.exit(unexplained > 0)


if __name__ == "__main__":
    main()

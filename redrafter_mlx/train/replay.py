"""Real acceptance without the target: its stored greedy text is replayed through the drafter's own search.

Greedy text is a function of the target alone, so a search from the state in which a token was chosen, held against the
tokens that followed, takes exactly the steps that decoding with this drafter would take. What decoding starts its
steps from is not every position alike (it stops where guessing is hard), so this is lower than the teacher-forced
figure over all positions, and it is the one that counts.
"""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from redrafter_mlx.decode import Stats
from redrafter_mlx.drafter import Embed, RecurrentDrafter
from redrafter_mlx.search import search
from redrafter_mlx.tree import Beam

from .corpus import Corpus


def num_accepted(
    tokens: np.ndarray, slots: np.ndarray, logprobs: np.ndarray, nodes: int, truth: list[int]
) -> int:
    """How many tokens of `truth` a search has found among its nodes - 1 most probable candidates.

    Args:
        tokens, slots, logprobs: (L-1, W), see `redrafter_mlx.tree.Levels`.
    """
    width = tokens.shape[1]
    best = np.argsort(-logprobs.reshape(-1), kind="stable")[: nodes - 1]
    kept = np.isin(np.arange(tokens.size), best).reshape(tokens.shape)
    slot = -1
    for depth, token in enumerate(truth[: len(tokens)]):
        match = [
            w
            for w in range(width)
            if tokens[depth, w] == token and kept[depth, w] and (depth == 0 or slots[depth, w] == slot)
        ]
        if not match:
            return depth
        slot = match[0]
    return min(len(truth), len(tokens))


def replay(
    drafter: RecurrentDrafter, embed: Embed, contexts: np.ndarray, tokens: list[int], beam: Beam
) -> Iterator[int]:
    """Draft tokens accepted in each step over one greedy text, up to its last whole beam.

    Args:
        contexts: (n, C); contexts[j] is the state in which the target chose tokens[j].
    """
    nodes = min(beam.nodes or beam.most_nodes, beam.most_nodes)
    position = 0
    while position + beam.length <= len(tokens):
        context = mx.array(contexts[position]).astype(mx.float32)
        root = mx.array(tokens[position], dtype=mx.int32)
        levels = search(drafter, context, root, embed, width=beam.width, length=beam.length)
        mx.eval(levels.tokens, levels.slots, levels.logprobs)
        accepted = num_accepted(
            np.array(levels.tokens), np.array(levels.slots), np.array(levels.logprobs), nodes,
            tokens[position + 1 : position + beam.length],
        )  # fmt: skip
        yield accepted
        position += accepted + 1


def replayed(
    drafter: RecurrentDrafter, embed: Embed, contexts: np.ndarray, tokens: list[int], beam: Beam
) -> Stats:
    """What decoding one greedy text takes; arguments as `replay`."""
    stats = Stats()
    for accepted in replay(drafter, embed, contexts, tokens, beam):
        stats.observe(beam.nodes or beam.most_nodes, accepted)
    return stats


def held_out(drafter: RecurrentDrafter, embed: Embed, corpus: Corpus, beam: Beam, limit: int) -> Stats:
    """What decoding with the drafter brings on about `limit` tokens of held-out answers."""
    drafter.settle()
    stats = Stats()
    for contexts, tokens in corpus.held_out_answers(limit):
        stats.add(replayed(drafter, embed, contexts, tokens, beam))
    return stats

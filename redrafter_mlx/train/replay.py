"""Acceptance without running the target: its stored greedy text is replayed through the drafter's own search.

Greedy text depends on the target alone. So searching from the context in which a token was chosen, and comparing the
draft with the tokens that followed, takes exactly the steps that decoding with this drafter would take. Decoding starts
more of its steps where guessing is hard, so this figure is lower than the teacher-forced one over all positions, and it
is the one that counts.
"""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from redrafter_mlx.drafters.beam import search
from redrafter_mlx.drafters.interface import Embed, Seen
from redrafter_mlx.drafters.recurrent import RecurrentDrafter, Rnn
from redrafter_mlx.stats import Stats
from redrafter_mlx.tree import Beam

from .corpus import Corpus


def replay(
    drafter: RecurrentDrafter, embed: Embed, contexts: np.ndarray, tokens: list[int], beam: Beam
) -> Iterator[int]:
    """Yield how many draft tokens each step over one greedy text accepts, up to the last whole beam.

    Args:
        contexts: (n, C); contexts[j] is the state in which the target chose tokens[j].
    """
    nodes = min(beam.nodes or beam.most_nodes, beam.most_nodes)
    recurrence, position = Rnn(drafter, embed), 0
    while position + beam.length <= len(tokens):
        context = mx.array(contexts[position]).astype(mx.float32)
        root = mx.array(tokens[position], dtype=mx.int32)
        found = search(recurrence, Seen(context, root, None), beam)
        mx.eval(found.tokens, found.parents, found.logprobs)
        accepted = found.num_matching(tokens[position + 1 : position + beam.length], nodes)
        yield accepted
        position += accepted + 1


def replayed(
    drafter: RecurrentDrafter, embed: Embed, contexts: np.ndarray, tokens: list[int], beam: Beam
) -> Stats:
    """Statistics of decoding one greedy text; arguments as `replay`."""
    stats = Stats()
    for accepted in replay(drafter, embed, contexts, tokens, beam):
        stats.observe(beam.nodes or beam.most_nodes, accepted + 1)
    return stats


def held_out(drafter: RecurrentDrafter, embed: Embed, corpus: Corpus, beam: Beam, limit: int) -> Stats:
    """Statistics of decoding about `limit` tokens of held-out answers with the drafter."""
    drafter, stats = drafter.frozen(), Stats()
    for contexts, tokens in corpus.held_out_answers(limit):
        stats.add(replayed(drafter, embed, contexts, tokens, beam))
    return stats

"""Penalties on repeated tokens, and the bias of chosen ones, for all nodes of a token tree at once.

Letters: N nodes, V vocabulary.
"""

from __future__ import annotations

import mlx.core as mx

from redrafter_mlx.tree import TokenTree, ancestor_mask

from .settings import Sampling


def penalized(  # noqa: PLR0913  (arrays of one node each)
    logits: mx.array,
    sampling: Sampling,
    prompt: mx.array,
    generated: mx.array,
    tree: TokenTree | None,
    bias: mx.array | None = None,
) -> mx.array:
    """Apply penalties and bias to the logits of every node, whose history is the text and its ancestors.

    Args:
        logits: (N, V).
        prompt: (V,) float32, how often every token stands in the prompt.
        generated: (V,) float32, how often every token stands in the text generated before the root.
        tree: N nodes, the root included; None where `generated` holds all that is generated.
        bias: (V,) float32, added first; None for none.
    """
    logits = logits.astype(mx.float32)
    if bias is not None:
        logits = logits + bias
    generated = generated[None]
    if tree is not None:
        mask = ancestor_mask(tree.parents, tree.height) if tree.mask is None else tree.mask
        rows = mx.broadcast_to(mx.arange(tree.num_nodes)[:, None], mask.shape)
        columns = mx.broadcast_to(tree.tokens[None], mask.shape)
        own = mx.zeros(logits.shape).at[rows, columns].add(mask.astype(mx.float32))  # (N, V)
        generated = generated + own
    seen = (generated + prompt[None]) > 0
    if sampling.repetition_penalty != 1:
        penalty = sampling.repetition_penalty
        logits = mx.where(seen, mx.where(logits > 0, logits / penalty, logits * penalty), logits)
    logits = logits - sampling.frequency_penalty * generated
    return logits - sampling.presence_penalty * (generated > 0)

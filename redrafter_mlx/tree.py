"""The token tree: what the target checks in one forward.

Letters: W beam width, L beam length counting the root, N nodes, P candidates of a drafter.

Worked example, used in docs/algorithm.md and in the tests. Three beams over words:

    Mars is a    red        root 0 Mars
    Mars is reddish when         1 is        parents 0 0 1 1 1 2 3 4
    Mars is dark red             2 a         depth   0 1 2 2 2 3 3 3
                                 3 reddish   mask row 5 (red after a): nodes 0 1 2 5
                                 4 dark
                                 5 red (after a)   6 when   7 red (after dark)

The 12 tokens of the beams are 8 nodes. Row i of the mask is True at node i and its ancestors.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from .device import fused

MAX_NODES = 64
"""Rows of one verification: a bound on buffers and compile time."""

NEVER = -1e30
"""Log-probability of a candidate that is not offered."""


@dataclass(frozen=True, slots=True)
class Beam:
    """Shape of a draft: `width` beams of `length` tokens, root included; at most `nodes` rows are verified.

    Without `nodes` every node of the surviving beams is verified.
    """

    width: int
    length: int
    nodes: int | None = None

    def __post_init__(self) -> None:
        if self.width < 1 or self.length < 2:
            raise ValueError(
                f"a beam needs width >= 1 and length >= 2 (the root counts), not {self.width}x{self.length}"
            )
        limit = min(MAX_NODES, self.most_nodes) if self.nodes is not None else MAX_NODES
        if self.nodes is not None and not 2 <= self.nodes <= limit:
            raise ValueError(f"{self.width}x{self.length} can verify 2 to {limit} nodes, not {self.nodes}")
        if self.nodes is None and self.most_nodes > MAX_NODES:
            raise ValueError(
                f"{self.width}x{self.length} is up to {self.most_nodes} nodes, more than {MAX_NODES}: "
                f"cap them, as in {self.width}x{self.length}@32"
            )

    @property
    def most_nodes(self) -> int:
        """Nodes when no two beams share a prefix beyond the root."""
        return 1 + self.width * (self.length - 1)

    @classmethod
    def parse(cls, text: str) -> Beam:
        """Read "WxL" or "WxL@N".

        Raises:
            ValueError: not of that form, or an impossible shape.
        """
        match = re.fullmatch(r"(\d+)x(\d+)(?:@(\d+))?", text.strip())
        if match is None:
            raise ValueError(f"draft must be auto, off, WxL or WxL@N (as 3x4 or 8x5@16), not {text!r}")
        width, length, nodes = match.groups()
        return cls(int(width), int(length), int(nodes) if nodes else None)

    def __str__(self) -> str:
        return f"{self.width}x{self.length}" + (f"@{self.nodes}" if self.nodes else "")


@dataclass(frozen=True, slots=True)
class TokenTree:
    """N nodes, node 0 the root, parents before children; all on the device."""

    tokens: mx.array
    """(N,) int32"""
    parents: mx.array
    """(N,) int32; the root is its own parent"""
    depth: mx.array
    """(N,) int32; the root has 0"""
    mask: mx.array | None
    """(N, N) bool, True = row may attend; None for a chain, whose mask is the causal one"""
    height: int
    """greatest depth a node can have; L - 1"""

    @property
    def num_nodes(self) -> int:
        return self.tokens.shape[0]

    @property
    def is_chain(self) -> bool:
        return self.mask is None


@dataclass(frozen=True, slots=True)
class Candidates:
    """What a drafter offers: P nodes below the root, parents before children; all on the device."""

    tokens: mx.array
    """(P,) int32, the target's ids"""
    parents: mx.array
    """(P,) int32, index of a candidate; -1 for the root"""
    logprobs: mx.array
    """(P,) float32 of the path from the root, so no child has more than its parent; `NEVER`: not offered"""
    height: int
    """greatest depth a candidate can have"""
    is_chain: bool = False
    """True where every candidate is the child of the one before"""

    @property
    def num_candidates(self) -> int:
        return self.tokens.shape[0]

    def best(self, nodes: int | None) -> np.ndarray:
        """Indices of the `nodes` - 1 most probable candidates that are offered, best first; None: of all."""
        logprobs = np.array(self.logprobs)
        order = np.argsort(-_rank_key(logprobs), kind="stable")[: int((logprobs > NEVER / 2).sum())]
        return order if nodes is None else order[: nodes - 1]

    def num_matching(self, text: Sequence[int], nodes: int | None = None) -> int:
        """How many tokens of `text` are found along a path among the `nodes` - 1 most probable candidates.

        Reads the candidates, so it waits for them.
        """
        kept = np.sort(self.best(nodes))
        rows = {int(index): row for row, index in enumerate(kept)}
        parents = [rows.get(parent, -1) for parent in np.array(self.parents)[kept].tolist()]
        return num_matching(np.array(self.tokens)[kept].tolist(), parents, text)

    def num_offered(self) -> mx.array:
        """() int32: candidates that are not `NEVER`."""
        return (self.logprobs > NEVER / 2).sum().astype(mx.int32)


def num_matching(tokens: Sequence[int], parents: Sequence[int], text: Sequence[int]) -> int:
    """How many tokens of `text` are found along a path from the root; of equal siblings the first counts."""
    child: dict[tuple[int, int], int] = {}
    for index, edge in enumerate(zip(parents, tokens, strict=True)):
        child.setdefault(edge, index)
    at = -1
    for depth, token in enumerate(text):
        found = child.get((at, token))
        if found is None:
            return depth
        at = found
    return len(text)


def _rank_key(logprobs: Any) -> Any:
    """What nodes are ordered by: a parent ranks strictly before its child even where the child's probability is 1."""
    return logprobs - 1e-5 * (np if isinstance(logprobs, np.ndarray) else mx).arange(logprobs.shape[0])


def chain(tokens: mx.array) -> TokenTree:
    """A tree without branches: tokens (N,), the root first."""
    n = tokens.shape[0]
    rows = mx.arange(n, dtype=mx.int32)
    return TokenTree(tokens, mx.maximum(rows - 1, 0), rows, None, n - 1)


def ancestor_mask(parents: mx.array, height: int) -> mx.array:
    """(N,) parents -> (N, N) bool: True at every node and its ancestors, of which there are `height` at most."""
    nodes = mx.arange(parents.shape[0], dtype=parents.dtype)
    mask = (nodes[:, None] == nodes) | (parents[:, None] == nodes)
    reach = 1
    while reach < height:  # what two steps reach is a product of what one reaches
        steps = mask.astype(mx.float32)
        mask, reach = steps @ steps > 0, 2 * reach
    return mask


def build(candidates: Candidates, root: mx.array, nodes: int) -> TokenTree:
    """The tree of the root and the `nodes` - 1 most probable candidates.

    A child never outranks its parent, so any such set is closed under parents. The nodes on the most probable
    path come first (accepting them is a plain trim of the cache), the rest by falling probability.

    Args:
        candidates: P of them.
        root: () int32.
        nodes: N, 2 ... 1 + P.
    """
    if candidates.is_chain:
        return chain(mx.concatenate([root.reshape(1), candidates.tokens[: nodes - 1]]))
    picks = mx.arange(nodes - 1, dtype=mx.int32)
    height = min(candidates.height, nodes - 1)
    arrays = _pack(candidates.tokens, candidates.parents, candidates.logprobs, root, picks, height)
    return TokenTree(*arrays, height)


@fused
def _pack(  # noqa: PLR0913  (arrays, not a dataclass, so that it can be compiled)
    tokens: mx.array,
    parents: mx.array,
    logprobs: mx.array,
    root: mx.array,
    picks: mx.array,
    height: int,
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    size, num_picks = tokens.shape[0], picks.shape[0]
    zero = mx.zeros((1,), dtype=mx.int32)
    chosen = mx.argsort(-_rank_key(logprobs))[:num_picks].astype(mx.int32)
    node_of = mx.zeros((size + 1,), dtype=mx.int32)  # entry 0: the root
    node_of[chosen + 1] = picks + 1
    by_rank = mx.concatenate([zero, node_of[parents[chosen] + 1]])  # (N,) parents
    mask = ancestor_mask(by_rank, height)
    depth = mask.astype(mx.int32).sum(axis=1) - 1
    # On the most probable path: a node that is, like all above it, the first child of its parent.
    rows = mx.arange(num_picks + 1, dtype=mx.int32)
    siblings = (by_rank[:, None] == by_rank) & (rows > 0)
    is_later = (mx.argmax(siblings, axis=1) != rows) & (rows > 0)
    is_off = mx.any(mask & is_later, axis=1)
    order = mx.argsort(mx.where(is_off, num_picks + 1 + rows, depth))
    row_of = mx.zeros((num_picks + 1,), dtype=mx.int32)
    row_of[order] = rows
    ordered = mx.concatenate([root.reshape(1), tokens[chosen]])[order]
    return ordered, row_of[by_rank[order]], depth[order], mask[order][:, order]


def merge(*offers: Candidates) -> Candidates:
    """One set of several offers, in which equal paths are one candidate, of the higher probability.

    Candidates keep the order of the offers. One whose path an earlier candidate has is `NEVER` afterwards, and its
    children are the earlier one's. So no two siblings that are offered carry the same token.
    """
    tokens = mx.concatenate([each.tokens for each in offers])
    logprobs = mx.concatenate([each.logprobs for each in offers])
    begins = [sum(each.num_candidates for each in offers[:index]) for index in range(len(offers))]
    shifted = [
        mx.where(each.parents < 0, -1, each.parents + begin)
        for each, begin in zip(offers, begins, strict=True)
    ]
    # Within one offer no path comes twice, so paths can be equal only as deep as the second highest offer goes.
    *_, shared, height = sorted([0, *(each.height for each in offers)])
    arrays = _merge(tokens, mx.concatenate(shifted), logprobs, max(1, shared))
    return Candidates(*arrays, height)


@fused
def _merge(
    tokens: mx.array, parents: mx.array, logprobs: mx.array, depth: int
) -> tuple[mx.array, mx.array, mx.array]:
    order = mx.arange(tokens.shape[0], dtype=mx.int32)
    for _ in range(depth):  # one level more is right after every pass
        equal = (tokens[:, None] == tokens) & (parents[:, None] == parents) & (logprobs > NEVER / 2)
        first = mx.argmax(equal | (order[:, None] == order), axis=1).astype(mx.int32)
        parents = mx.where(parents < 0, -1, first[parents])
    best = mx.where(equal, logprobs, NEVER).max(axis=1)
    return tokens, parents, mx.where(first == order, mx.maximum(best, logprobs), NEVER)

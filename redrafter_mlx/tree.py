"""The token tree: what the target checks in one forward.

Letters: W beam width, L beam length counting the root, N nodes, P = W (L-1) candidates of a beam search.

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
from dataclasses import dataclass

import mlx.core as mx

from .device import fused

MAX_NODES = 64  # rows of one verification; past this no machine gains


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
            ValueError: not of that form, or a shape that cannot be.
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
class Levels:
    """What a beam search leaves behind: W tokens per level and the slot of each one's parent."""

    tokens: mx.array
    """(L-1, W) int32, most probable first within a level"""
    slots: mx.array
    """(L-1, W) int32: slot of the parent in the level before; 0 in the first level (the root)"""
    logprobs: mx.array
    """(L-1, W) float32: log-probability of the path from the root"""

    @property
    def width(self) -> int:
        return self.tokens.shape[1]

    @property
    def length(self) -> int:
        return self.tokens.shape[0] + 1


def chain(tokens: mx.array) -> TokenTree:
    """A tree without branches: tokens (N,), the root first."""
    n = tokens.shape[0]
    rows = mx.arange(n, dtype=mx.int32)
    return TokenTree(tokens, mx.maximum(rows - 1, 0), rows, None, n - 1)


def ancestor_mask(parents: mx.array, height: int) -> mx.array:
    """(N,) parents -> (N, N) bool: True at every node and its ancestors. `height` boolean steps."""
    nodes = mx.arange(parents.shape[0], dtype=parents.dtype)
    mask = nodes[:, None] == nodes
    above = parents
    for _ in range(height):
        mask = mask | (above[:, None] == nodes)
        above = parents[above]
    return mask


def survivors(levels: Levels) -> mx.array:
    """(L-1, W) bool: True where a node lies on a beam of the last level."""
    slots = mx.arange(levels.width, dtype=mx.int32)
    alive = mx.ones((levels.width,), dtype=mx.bool_)
    rows = [alive]
    for level in range(levels.length - 2, 0, -1):  # which slots of level-1 have a living child
        child_of = levels.slots[level][:, None] == slots
        alive = mx.any(child_of & alive[:, None], axis=0)
        rows.append(alive)
    return mx.stack(rows[::-1])


def build(levels: Levels, root: mx.array, nodes: int) -> TokenTree:
    """The tree of the root and the `nodes` - 1 most probable candidates.

    A child never outranks its parent, so any such set is closed under parents; no matching of prefixes is
    needed because a beam search never holds two equal paths. The nodes on the most probable beam come first
    (accepting them is a plain trim of the cache), the rest by falling probability.

    Args:
        levels: of a search with L-1 levels of W slots.
        root: () int32.
        nodes: N, at most 1 + W (L-1).
    """
    if levels.width == 1:
        return chain(mx.concatenate([root.reshape(1), levels.tokens[: nodes - 1, 0]]))
    tokens, parents, depth, mask = _pack(levels.tokens, levels.slots, levels.logprobs, root, nodes)
    return TokenTree(tokens, parents, depth, mask, levels.length - 1)


@fused
def _pack_arrays(
    tokens: mx.array, slots: mx.array, logprobs: mx.array, root: mx.array, picks: mx.array
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    height, width = tokens.shape
    size = height * width
    level = mx.arange(size, dtype=mx.int32) // width
    # A parent ranks strictly before its child even where the child's probability is 1.
    rank_key = logprobs.reshape(-1) - 1e-4 * level.astype(mx.float32)
    chosen = mx.argsort(-rank_key)[: picks.shape[0]].astype(mx.int32)  # (N-1,) candidates
    # Candidates on the best beam first, in order of depth.
    slot, on_best = mx.array(0, dtype=mx.int32), []
    for row in range(height - 1, -1, -1):
        on_best.append(mx.arange(width, dtype=mx.int32) == slot)
        slot = slots[row][slot]
    best = mx.concatenate(on_best[::-1])  # (P,)
    order_key = mx.where(best[chosen], chosen // width, size + picks)
    chosen = chosen[mx.argsort(order_key)]
    node_of = mx.zeros((size + 1,), dtype=mx.int32)
    node_of[chosen + 1] = picks + 1  # entry 0: the root
    parent = mx.where(level == 0, 0, (level - 1) * width + slots.reshape(-1) + 1)  # into node_of
    zero = mx.zeros((1,), dtype=mx.int32)
    parents = mx.concatenate([zero, node_of[parent[chosen]]])
    depth = mx.concatenate([zero, level[chosen] + 1])
    packed = mx.concatenate([root.reshape(1), tokens.reshape(-1)[chosen]])
    return packed, parents, depth, ancestor_mask(parents, height)


def _pack(
    tokens: mx.array, slots: mx.array, logprobs: mx.array, root: mx.array, nodes: int
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    return _pack_arrays(tokens, slots, logprobs, root, mx.arange(nodes - 1, dtype=mx.int32))

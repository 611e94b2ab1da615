"""The one acceptance rule, for greedy decoding and sampling alike.

The target has drawn its own token after every node. A node is accepted when it equals the token drawn at
its accepted parent. The accepted nodes are one path; the token drawn at its end is the next token. No drafter
probabilities are involved (docs/algorithm.md, "Exactness"), and nothing is assumed about the tree: where siblings
carry the same token, the first of them is taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import mlx.core as mx

from .device import fused
from .tree import TokenTree


@dataclass(frozen=True, slots=True)
class Acceptance:
    """The accepted path of a decode step; its arrays stay on the device until `read`."""

    num_accepted: mx.array
    """() int32: draft tokens kept, 0 ... L-1"""
    last: mx.array
    """() int32: the node at which the path ends"""
    next_token: mx.array
    """() int32: the target's own token after the path, root of the next step"""
    choice: mx.array
    """(N,) int32: the target's own token after every node"""
    summary: mx.array
    """(2 + 2L,) int32: num_accepted, next_token, nodes of the path, their tokens; undefined past the path's end"""

    @property
    def path(self) -> mx.array:
        """(L,) int32: the nodes of the path, root first; the entries after the first num_accepted + 1 are any nodes."""
        height = (self.summary.shape[0] - 2) // 2
        return self.summary[2 : 2 + height]

    def read(self) -> tuple[list[int], list[int]]:
        """Wait for the device, once per step: the nodes of the path, root first, and the tokens to emit."""
        values = cast(list[int], self.summary.tolist())
        count, height = values[0] + 1, (len(values) - 2) // 2
        path = values[2 : 2 + count]
        tokens = values[2 + height : 2 + height + count]
        return path, [*tokens[1:], values[1]]

    def phrase(self, tree: TokenTree, path: list[int]) -> list[int]:
        """What the target chose at the path's end and after every rejected node on the way on from there, the first
        child always; empty where nothing was rejected there. Read after the summary it costs no wait.
        """
        last = path[-1]
        if last == tree.num_nodes - 1:
            return []
        parents, choice = cast(list[int], tree.parents.tolist()), cast(list[int], self.choice.tolist())
        found = [choice[last]]
        for node in range(last + 1, len(parents)):
            if parents[node] == last:
                found.append(choice[node])
                last = node
        return found


def accept(tree: TokenTree, choice: mx.array) -> Acceptance:
    """Walk from the root while the target's choice is a child.

    Args:
        tree: N nodes.
        choice: (N,) int32, the target's own token after every node.
    """
    num_accepted, last, next_token, summary = _walk(
        tree.tokens, tree.parents, tree.depth, choice, tree.height
    )
    return Acceptance(num_accepted, last, next_token, choice, summary)


@fused
def _walk(
    tokens: mx.array, parents: mx.array, depth: mx.array, choice: mx.array, height: int
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    choice = choice.astype(mx.int32)
    agrees = (tokens == choice[parents]) & (depth > 0)
    node = mx.zeros((1,), dtype=mx.int32)  # the end of the path so far
    is_on = mx.ones((1,), dtype=mx.bool_)
    path, reached = [node], []
    for _ in range(height):
        children = (parents == node) & agrees
        is_on = is_on & mx.any(children)
        node = mx.argmax(children, keepdims=True).astype(mx.int32)  # the first of them
        path.append(node)
        reached.append(is_on)
    walked = mx.concatenate(path)  # (L,)
    num_accepted = mx.concatenate(reached).sum().astype(mx.int32) if reached else mx.array(0, dtype=mx.int32)
    last = walked[num_accepted]
    next_token = choice[last]
    head = mx.stack([num_accepted, next_token])
    return num_accepted, last, next_token, mx.concatenate([head, walked, tokens[walked]])

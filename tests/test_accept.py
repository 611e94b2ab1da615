"""The acceptance rule on hand-made choices: never, sometimes, always."""

from __future__ import annotations

import pytest

import redrafter_mlx  # noqa: F401

# isort: split
import mlx.core as mx
import numpy as np

from redrafter_mlx.accept import accept
from redrafter_mlx.tree import TokenTree, ancestor_mask, build, chain
from tests.offers import MARS, MARS_OFFER, RED, random_offer


def tree_of(tokens: list[int], parents: list[int]) -> TokenTree:
    depth = [0] * len(tokens)
    for node in range(1, len(tokens)):
        depth[node] = depth[parents[node]] + 1
    p = mx.array(parents, dtype=mx.int32)
    height = max(depth)
    mask = ancestor_mask(p, height)
    return TokenTree(mx.array(tokens, dtype=mx.int32), p, mx.array(depth, dtype=mx.int32), mask, height)


TREE = tree_of([50, 11, 12, 13, 14, 13], [0, 0, 1, 2, 0, 4])


@pytest.mark.parametrize(
    ("choice", "path", "tokens"),
    [
        ([99, 0, 0, 0, 0, 0], [0], [99]),  # never: the root's choice is no child
        ([11, 77, 0, 0, 0, 0], [0, 1], [11, 77]),  # sometimes
        ([11, 12, 13, 66, 0, 0], [0, 1, 2, 3], [11, 12, 13, 66]),  # always
        ([14, 0, 0, 0, 13, 5], [0, 4, 5], [14, 13, 5]),  # the second branch
        (
            [11, 13, 13, 0, 13, 0],
            [0, 1],
            [11, 13],
        ),  # agreement behind a refused node does not count
    ],
)
def test_walk(choice: list[int], path: list[int], tokens: list[int]) -> None:
    found = accept(TREE, mx.array(choice))
    assert found.read() == (path, tokens)
    assert found.num_accepted.item() == len(path) - 1
    assert found.last.item() == path[-1] and found.next_token.item() == tokens[-1]
    walked = np.array(found.path).tolist()
    assert walked[: len(path)] == path and len(walked) == TREE.height + 1 and max(walked) < TREE.num_nodes


def test_worked_example() -> None:
    """The target says "is dark red" and then a full stop: three draft tokens and the next one are emitted."""
    tree = build(MARS_OFFER, mx.array(MARS), 10)
    words = tree.tokens.tolist()
    says = {MARS: 11, 11: 14, 14: RED}  # word -> the target's choice after it
    found = accept(tree, mx.array([says.get(word, 0) for word in words]))
    assert found.read()[1] == [11, 14, RED, 0]


def test_root_alone() -> None:
    assert accept(chain(mx.array([7])), mx.array([8])).read() == ([0], [8])


@pytest.mark.parametrize("seed", range(20))
def test_against_a_plain_walk(seed: int) -> None:
    rng = np.random.default_rng(seed)
    tree = build(random_offer(rng, 6, 5), mx.array(3), 20)
    tokens, parents = tree.tokens.tolist(), tree.parents.tolist()
    choice = [
        int(rng.choice([tokens[n] for n in range(1, 20) if parents[n] == node] or [0])) for node in range(20)
    ]
    choice[int(rng.integers(20))] = 99
    node, path = 0, [0]
    while (
        child := next((n for n in range(1, 20) if parents[n] == node and tokens[n] == choice[node]), None)
    ) is not None:
        node = child
        path.append(node)
    assert accept(tree, mx.array(choice)).read() == (
        path,
        [*[tokens[n] for n in path[1:]], choice[node]],
    )


@pytest.mark.parametrize("seed", range(40))
def test_siblings_with_equal_tokens_emit_only_what_the_target_chose(seed: int) -> None:
    """A tree with few tokens has equal siblings everywhere; what is emitted is still a walk of the target's choices."""
    rng = np.random.default_rng(seed)
    parents = [0, *(int(rng.integers(0, node)) for node in range(1, 16))]
    tokens = [5, *(int(rng.integers(7, 9)) for _ in range(15))]
    tree = tree_of(tokens, parents)
    choice = [int(rng.integers(7, 9)) for _ in range(16)]
    for node in range(1, 16):  # after equal siblings the target chooses alike, as their texts are the same
        twin = next(n for n in range(1, 16) if path_to(n, tokens, parents) == path_to(node, tokens, parents))
        choice[node] = choice[twin]
    path, emitted = accept(tree, mx.array(choice)).read()
    assert len(emitted) == len(path)
    for node, parent in zip(path[1:], path, strict=False):
        assert parents[node] == parent and tokens[node] == choice[parent]
    assert emitted == [choice[node] for node in path]


def path_to(node: int, tokens: list[int], parents: list[int]) -> tuple[int, ...]:
    return () if node == 0 else (*path_to(parents[node], tokens, parents), tokens[node])


def test_equal_siblings_of_the_reported_tree() -> None:
    """Once this gave the path 0 1 3 5 7, and a token from beyond the array."""
    tree = tree_of([5, 7, 7, 8, 8], [0, 0, 0, 1, 2])
    assert accept(tree, mx.array([7, 8, 8, 3, 3])).read() == ([0, 1, 3], [7, 8, 3])

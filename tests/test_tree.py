"""Trees: the worked example of the docs, laws over random candidates, parity with the reference's packing."""

from __future__ import annotations

from pathlib import Path

import pytest

import redrafter_mlx  # noqa: F401  (before mlx)

# isort: split
import mlx.core as mx
import numpy as np

from redrafter_mlx.tree import NEVER, Beam, Candidates, TokenTree, ancestor_mask, build, chain, merge
from tests.offers import DARK, IS, MARS, MARS_OFFER, RED, REDDISH, WHEN, A, all_paths, offer, random_offer

TREES = Path(__file__).parent / "goldens" / "tree"


def paths_of(tree: TokenTree) -> list[tuple[int, ...]]:
    tokens, parents = tree.tokens.tolist(), tree.parents.tolist()
    out: list[tuple[int, ...]] = [()]
    for node in range(1, len(tokens)):
        assert parents[node] < node, "parents come first"
        out.append((*out[parents[node]], tokens[node]))
    return out


def test_worked_example() -> None:
    tree = build(MARS_OFFER, mx.array(MARS), 1 + int(MARS_OFFER.num_offered().item()))
    # the most probable path first, then by falling probability
    assert tree.tokens.tolist() == [MARS, IS, A, RED, REDDISH, DARK, WHEN, RED]
    assert tree.parents.tolist() == [0, 0, 1, 2, 1, 1, 4, 5]
    assert tree.depth.tolist() == [0, 1, 2, 3, 2, 2, 3, 3]
    assert tree.mask is not None
    assert [i for i, seen in enumerate(tree.mask[7].tolist()) if seen] == [0, 1, 5, 7]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("width", "length"), [(1, 2), (1, 5), (2, 2), (3, 4), (8, 5), (16, 3)])
def test_laws(seed: int, width: int, length: int) -> None:
    candidates = random_offer(np.random.default_rng(seed), width, length)
    by_path = all_paths(candidates)
    most = 1 + candidates.num_candidates
    for nodes in sorted({2, most, int(np.random.default_rng(seed).integers(2, most + 1))}):
        tree = build(candidates, mx.array(5), nodes)
        paths = paths_of(tree)
        assert tree.num_nodes == nodes and len(set(paths)) == nodes, "no duplicates"
        assert tree.depth.tolist() == [len(path) for path in paths]
        kept = sorted((by_path[path] for path in paths[1:]), reverse=True)
        assert kept == pytest.approx(sorted(by_path.values(), reverse=True)[: nodes - 1])
        mask = np.array(tree.mask)
        for node, path in enumerate(paths):
            above = {i for i, p in enumerate(paths) if path[: len(p)] == p}
            assert set(np.flatnonzero(mask[node])) == above, "a mask row is the ancestors"
        for node in range(1, nodes):  # from the root the best child, and again, as far as the tree goes
            children = [p for p in paths if len(p) == node and p[:-1] == paths[node - 1]]
            if not children:
                break
            assert by_path[paths[node]] == max(by_path[p] for p in children), "the most probable path first"


def test_equal_probabilities_stay_closed() -> None:
    """Where a child is certain it ties with its parent; the parent must still be taken first."""
    candidates = offer([1, 2, 3, 4, 5, 6], [-1, -1, 0, 1, 2, 3], [-0.5] * 6)
    for nodes in range(2, 8):
        paths = paths_of(build(candidates, mx.array(0), nodes))
        assert all(path[:-1] in paths for path in paths[1:])


def test_what_is_not_offered_comes_last() -> None:
    candidates = offer([1, 2, 3], [-1, -1, 0], [-1.0, NEVER, -2.0])
    assert candidates.num_offered().item() == 2
    assert build(candidates, mx.array(0), 3).tokens.tolist() == [0, 1, 3]


@pytest.mark.parametrize("seed", range(30))
def test_merged_offers_are_the_union_of_their_paths(seed: int) -> None:
    rng = np.random.default_rng(seed)
    offers = [
        random_offer(rng, int(rng.integers(1, 5)), int(rng.integers(2, 6)), 3) for _ in range(1 + seed % 3)
    ]
    merged = merge(*offers)
    want: dict[tuple[int, ...], float] = {}
    for each in offers:
        for path, logprob in all_paths(each).items():
            want[path] = max(logprob, want.get(path, -np.inf))
    count = int(merged.num_offered().item())
    assert count == len(want) and all_paths(merged) == pytest.approx(want)
    tree = build(merged, mx.array(9), 1 + count)
    assert set(paths_of(tree)[1:]) == set(want), "every path once"
    parents = merged.parents.tolist()
    assert all(parent < index for index, parent in enumerate(parents)), "parents before children"


def test_merged_example() -> None:
    """The two offers of docs/algorithm.md, "Several offers in one tree"."""
    planet = 18
    beam = offer([IS, A, RED], [-1, 0, 1], [-0.1, -1.0, -1.3])
    copy = offer([IS, A, planet], [-1, 0, 1], [-0.3, -0.4, -0.5])
    merged = merge(beam, copy)
    assert merged.parents.tolist() == [-1, 0, 1, -1, 0, 1]
    assert merged.logprobs.tolist() == pytest.approx([-0.1, -0.4, -1.3, NEVER, NEVER, -0.5])
    tree = build(merged, mx.array(MARS), 5)
    assert tree.tokens.tolist() == [MARS, IS, A, planet, RED]
    assert tree.parents.tolist() == [0, 0, 1, 2, 2]


def test_merging_leaves_the_unoffered_out() -> None:
    first, second = offer([7, 8], [-1, 0], [-1.0, NEVER]), offer([7, 8], [-1, 0], [-2.0, -3.0])
    assert all_paths(merge(first, second)) == pytest.approx({(7,): -1.0, (7, 8): -3.0})


@pytest.mark.parametrize("path", sorted(TREES.glob("*.npz")), ids=lambda p: p.stem)
def test_masks_of_the_reference(path: Path) -> None:
    """Same nodes, depths and attention as the reference packs for the same beams, its order aside."""
    io = np.load(path)
    for row, beams in enumerate(io["beams"]):
        if len(set(beams[:, 0].tolist())) > 1:
            continue  # beams with different roots cannot come from one draft
        count = int(io["n_selected"][row])
        prefixes: list[tuple[int, ...]] = []
        for beam in beams.tolist():
            for length in range(1, len(beam) + 1):
                if tuple(beam[:length]) not in prefixes:
                    prefixes.append(tuple(beam[:length]))
        assert len(prefixes) == count
        parents = mx.array([prefixes.index(p[:-1]) if len(p) > 1 else 0 for p in prefixes])
        mask = ancestor_mask(parents, beams.shape[1] - 1)
        assert [p[-1] for p in prefixes] == io["packed"][row][:count].tolist()
        np.testing.assert_array_equal(mask, io["tree_mask"][row][:count, :count].astype(bool))
        assert [len(p) - 1 for p in prefixes] == io["position_offsets"][row][:count].tolist()


def test_chain() -> None:
    tree = chain(mx.array([4, 5, 6], dtype=mx.int32))
    assert tree.is_chain and tree.parents.tolist() == [0, 0, 1] and tree.depth.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("text", "beam"),
    [("1x4", Beam(1, 4)), ("3x4@8", Beam(3, 4, 8)), (" 16x5@32 ", Beam(16, 5, 32))],
)
def test_parse(text: str, beam: Beam) -> None:
    assert Beam.parse(text) == beam and Beam.parse(str(beam)) == beam


@pytest.mark.parametrize(
    "text", ["", "x", "3x", "3x4@", "3X4", "0x4", "3x1", "3x4@1", "3x4@11", "-1x4", "30x5"]
)
def test_parse_refuses(text: str) -> None:
    with pytest.raises(ValueError):
        Beam.parse(text)


def test_only_kept_nodes_and_their_own_children_count() -> None:
    tokens, parents = np.array([7, 8, 1, 1]), np.array([-1, -1, 0, 1])
    logprobs = np.log(np.array([0.6, 0.3, 0.5, 0.1], dtype=np.float32))
    candidates = Candidates(mx.array(tokens), mx.array(parents), mx.array(logprobs), 2)

    def accepted(nodes: int, truth: list[int]) -> int:
        return candidates.num_matching(truth, nodes)

    assert accepted(5, [8, 1]) == 2
    assert accepted(4, [8, 1]) == 1, "the child of 8 is not among three candidates"
    assert accepted(5, [9, 1]) == 0
    assert accepted(2, [8]) == 0


def test_what_is_not_offered_does_not_count() -> None:
    candidates = Candidates(mx.array([7, 8]), mx.array([-1, -1]), mx.array([-0.1, NEVER]), 1)
    assert candidates.num_matching([8]) == 0
    assert candidates.num_matching([7]) == 1

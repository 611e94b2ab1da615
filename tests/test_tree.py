"""Trees: the worked example of the docs, laws over random beams, parity with the reference's packing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.toy import make_target

# isort: split
import mlx.core as mx
import numpy as np

from redrafter_mlx.tree import Beam, Levels, TokenTree, ancestor_mask, build, chain, survivors

TREES = Path(__file__).parent / "goldens" / "tree"

# "Mars is a red / Mars is reddish when / Mars is dark red" (docs/algorithm.md)
MARS, IS, A, REDDISH, DARK, RED, WHEN = range(10, 17)
MARS_LEVELS = Levels(
    mx.array([[IS, 99, 98], [A, REDDISH, DARK], [RED, WHEN, RED]], dtype=mx.int32),
    mx.array([[0, 0, 0], [0, 0, 0], [0, 1, 2]], dtype=mx.int32),
    mx.array([[-0.1, -9.0, -9.5], [-1.0, -1.2, -1.4], [-1.3, -1.6, -2.0]]),
)


def random_levels(rng: np.random.Generator, width: int, length: int, vocab: int = 12) -> Levels:
    """What a beam search over random log-probabilities leaves, computed the slow way."""
    tokens, slots, logprobs = [], [], []
    paths = {0: 0.0}
    for _ in range(length - 1):
        grown = []
        for slot, total in paths.items():
            scores = np.log(rng.dirichlet(np.full(vocab, 0.3)) + 1e-9)
            grown += [(total + score, slot, token) for token, score in enumerate(scores)]
        grown = sorted(grown, reverse=True)[:width]
        tokens.append([g[2] for g in grown])
        slots.append([g[1] for g in grown])
        logprobs.append([g[0] for g in grown])
        paths = {index: g[0] for index, g in enumerate(grown)}
    return Levels(
        mx.array(tokens, dtype=mx.int32),
        mx.array(slots, dtype=mx.int32),
        mx.array(logprobs, dtype=mx.float32),
    )


def all_paths(levels: Levels) -> dict[tuple[int, ...], float]:
    """Every candidate as its path of tokens below the root -> log-probability."""
    tokens, slots, logprobs = (np.array(a) for a in (levels.tokens, levels.slots, levels.logprobs))
    paths: list[list[tuple[int, ...]]] = [[()]]
    out: dict[tuple[int, ...], float] = {}
    for level in range(tokens.shape[0]):
        row = [(*paths[-1][slots[level, w]], int(tokens[level, w])) for w in range(tokens.shape[1])]
        paths.append(row)
        out |= dict(zip(row, logprobs[level].tolist(), strict=True))
    return out


def paths_of(tree: TokenTree) -> list[tuple[int, ...]]:
    tokens, parents = tree.tokens.tolist(), tree.parents.tolist()
    out: list[tuple[int, ...]] = [()]
    for node in range(1, len(tokens)):
        assert parents[node] < node, "parents come first"
        out.append((*out[parents[node]], tokens[node]))
    return out


def test_worked_example() -> None:
    alive = survivors(MARS_LEVELS)
    assert alive.tolist() == [[True, False, False], [True] * 3, [True] * 3]
    levels = Levels(MARS_LEVELS.tokens, MARS_LEVELS.slots, mx.where(alive, MARS_LEVELS.logprobs, -1e30))
    tree = build(levels, mx.array(MARS), 1 + int(alive.sum().item()))
    # the best beam first, then by falling probability
    assert tree.tokens.tolist() == [MARS, IS, A, RED, REDDISH, DARK, WHEN, RED]
    assert tree.parents.tolist() == [0, 0, 1, 2, 1, 1, 4, 5]
    assert tree.depth.tolist() == [0, 1, 2, 3, 2, 2, 3, 3]
    assert tree.mask is not None
    assert [i for i, seen in enumerate(tree.mask[7].tolist()) if seen] == [0, 1, 5, 7]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("width", "length"), [(1, 2), (1, 5), (2, 2), (3, 4), (8, 5), (16, 3)])
def test_laws(seed: int, width: int, length: int) -> None:
    rng = np.random.default_rng(seed)
    levels = random_levels(rng, min(width, 12), length)
    candidates = all_paths(levels)
    most = 1 + levels.width * (length - 1)
    for nodes in sorted({2, most, int(rng.integers(2, most + 1))}):
        tree = build(levels, mx.array(5), nodes)
        paths = paths_of(tree)
        assert tree.num_nodes == nodes and len(set(paths)) == nodes, "no duplicates"
        assert tree.depth.tolist() == [len(path) for path in paths]
        if levels.width > 1:  # a chain's nodes are the best ones by themselves
            kept = sorted((candidates[path] for path in paths[1:]), reverse=True)
            assert kept == pytest.approx(sorted(candidates.values(), reverse=True)[: nodes - 1])
            mask = np.array(tree.mask)
            for node, path in enumerate(paths):
                above = {i for i, p in enumerate(paths) if path[: len(p)] == p}
                assert set(np.flatnonzero(mask[node])) == above, "a mask row is the ancestors"
        best = max((p for p in candidates if len(p) == length - 1), key=candidates.__getitem__)
        on_best = [path for path in paths if path == best[: len(path)]]
        assert paths[: len(on_best)] == on_best, "the most probable beam comes first"


def test_equal_probabilities_stay_closed() -> None:
    """Where a child is certain it ties with its parent; the parent must still be taken first."""
    levels = Levels(
        mx.array([[1, 2], [3, 4], [5, 6]], dtype=mx.int32),
        mx.array([[0, 0], [0, 1], [0, 1]], dtype=mx.int32),
        mx.array([[-0.5, -0.5], [-0.5, -0.5], [-0.5, -0.5]]),
    )
    for nodes in range(2, 8):
        paths = paths_of(build(levels, mx.array(0), nodes))
        assert all(path[:-1] in paths for path in paths[1:])


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


def test_every_family_verifies_trees() -> None:
    from tests.toy import FAMILIES

    for family in FAMILIES:
        make_target(family).check_tree()


def test_check_tree_notices_a_wrong_position() -> None:
    """Without the rope wrapper a branch would sit at its row's position."""
    target = make_target()
    for layer in target.model.layers:
        inner = layer.self_attn.rope.inner

        class ByRow(type(inner)):  # type: ignore[misc]
            def __call__(self, x, offset=0):  # type: ignore[no-untyped-def]
                return super().__call__(x, offset=offset if isinstance(offset, int) else 3)

        inner.__class__ = ByRow
        layer.self_attn.rope = inner
    with pytest.raises(ValueError, match="cannot verify a token tree"):
        target.check_tree()

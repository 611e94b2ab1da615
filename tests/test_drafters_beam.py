"""Beam search: the candidates of random models against a search on paper, laws of what is offered, `top_k`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.offers import all_paths
from tests.toy import make_drafter, make_target

# isort: split
import mlx.core as mx
import numpy as np

from redrafter_mlx.drafters.beam import SAMPLING_TAU, Recurrence, beams, search
from redrafter_mlx.drafters.interface import Seen
from redrafter_mlx.drafters.recurrent import changed
from redrafter_mlx.drafters.top_k import top_k
from redrafter_mlx.tree import NEVER, Beam, Candidates, build

Path = tuple[int, ...]
SHAPES = [(1, 2), (1, 5), (2, 2), (3, 4), (7, 5), (12, 3)]


@dataclass
class Table:
    """A recurrence whose logits depend on the level and on the two tokens before; it notes what it is fed with."""

    logits_of: np.ndarray[Any, Any]
    """(levels, V, V, V): by level, by the token before the last, by the last"""
    target_ids: mx.array | None = None
    calibration: Sequence[float] = ()
    fed: list[list[int]] = field(default_factory=list)

    @property
    def vocab(self) -> int:
        return self.logits_of.shape[-1]

    def own(self, tokens: mx.array) -> mx.array:
        """The drafter's ids of the target's."""
        if self.target_ids is None:
            return tokens
        return mx.argmax(tokens[:, None] == self.target_ids, axis=1)

    def begin(self, context: mx.array, root: mx.array) -> mx.array:
        first = context.astype(mx.int32).reshape(1)
        return mx.stack([first, self.own(root.reshape(1)).astype(mx.int32)], axis=1)  # (W, 2)

    def logits(self, state: mx.array, level: int) -> mx.array:
        return mx.array(self.logits_of[level])[state[:, 0], state[:, 1]]

    def advance(self, state: mx.array, slots: mx.array, tokens: mx.array, level: int) -> mx.array:
        self.fed.append(tokens.tolist())
        return mx.stack([state[slots][:, 1], self.own(tokens).astype(mx.int32)], axis=1)


def random_table(seed: int, vocab: int = 12, levels: int = 5, **options: Any) -> Table:
    rng = np.random.default_rng(seed)
    return Table(rng.normal(0, 2, (levels, vocab, vocab, vocab)).astype(np.float32), **options)


def seen(noise: mx.array | None = None, root: int = 2) -> Seen:
    return Seen(mx.array([1.0]), mx.array(root, dtype=mx.int32), noise)


def on_paper(
    table: Table, width: int, length: int, noise: Any = None, root: int = 2
) -> list[dict[Path, float]]:
    """The best paths of every level with their log-probability, best first. Tokens are the drafter's."""
    levels: list[dict[Path, float]] = []
    paths: dict[Path, float] = {(): 0.0}
    for level in range(length - 1):
        grown: dict[Path, float] = {}
        for path, total in paths.items():
            before = (1, root, *path)[-2:]
            logits = table.logits_of[level][before].astype(np.float64)
            if level < len(table.calibration):
                logits = logits / table.calibration[level]
            if noise is not None:
                logits = (logits + noise[level]) / SAMPLING_TAU
            logprobs = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
            grown |= {(*path, token): total + float(logprobs[token]) for token in range(table.vocab)}
        best = sorted(grown, key=grown.__getitem__, reverse=True)[:width]
        paths = {path: grown[path] for path in best}
        levels.append(paths)
    return levels


def paths_of(candidates: Candidates) -> list[Path]:
    """The path of every candidate, offered or not."""
    paths: list[Path] = []
    for token, parent in zip(candidates.tokens.tolist(), candidates.parents.tolist(), strict=True):
        assert parent < len(paths), "parents before children"
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    return paths


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("width", "length"), SHAPES)
def test_candidates_are_the_best_paths_of_every_level(seed: int, width: int, length: int) -> None:
    table = random_table(seed)
    candidates = search(table, seen(), Beam(width, length, 2))
    want = on_paper(table, width, length)
    assert candidates.num_candidates == width * (length - 1) and candidates.height == length - 1
    assert candidates.is_chain == (width == 1)
    assert candidates.tokens.dtype == candidates.parents.dtype == mx.int32
    assert candidates.logprobs.dtype == mx.float32
    assert paths_of(candidates) == [path for level in want for path in level], "by level, best first"
    logprobs = [logprob for level in want for logprob in level.values()]
    np.testing.assert_allclose(np.array(candidates.logprobs), logprobs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("width", "length"), SHAPES)
def test_an_open_beam_offers_what_lies_on_a_surviving_beam(seed: int, width: int, length: int) -> None:
    table = random_table(seed)
    candidates = search(table, seen(), Beam(width, length))
    want = on_paper(table, width, length)
    survivors = {path[:size] for path in want[-1] for size in range(1, length)}
    assert set(all_paths(candidates)) == survivors
    assert int(candidates.num_offered().item()) == len(survivors)
    assert paths_of(candidates) == [path for level in want for path in level], "masked, not taken out"
    tree = build(candidates, mx.array(2), 1 + len(survivors))
    assert tree.num_nodes == 1 + len(survivors)


def test_some_beam_dies() -> None:
    """Else the test above would prove nothing."""
    masked = [search(random_table(seed), seen(), Beam(3, 4)).logprobs for seed in range(4)]
    assert any((logprobs == NEVER).any().item() for logprobs in masked)


@pytest.mark.parametrize("nodes", [None, 2])
@pytest.mark.parametrize("seed", range(8))
def test_siblings_differ_and_children_are_no_more_probable(seed: int, nodes: int | None) -> None:
    """Also where many tokens are equally probable."""
    table = random_table(seed)
    table.logits_of = np.round(table.logits_of / 3).astype(np.float32)
    candidates = search(table, seen(), Beam(12, 5, nodes))
    paths = paths_of(candidates)
    assert len(set(paths)) == len(paths), "no two equal siblings"
    offered = all_paths(candidates)
    for path, logprob in offered.items():
        assert len(path) == 1 or logprob <= offered[path[:-1]] + 1e-5


@pytest.mark.parametrize(("width", "length"), SHAPES)
def test_beams_are_the_paths_of_the_last_level(width: int, length: int) -> None:
    table = random_table(0)
    got, logprobs = beams(table, mx.array([1.0]), 2, width, length)
    want = on_paper(table, width, length)[-1]
    assert got.tolist() == [[2, *path] for path in want]
    np.testing.assert_allclose(np.array(logprobs), list(want.values()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("width", "length"), SHAPES)
def test_noise_is_added_to_calibrated_logits(width: int, length: int) -> None:
    """Every level has its own calibration; past the last one logits are as they are."""
    table = random_table(3, calibration=(0.4, 3.0))
    noise = np.random.default_rng(1).gumbel(size=(length - 1, 12)).astype(np.float32)
    candidates = search(table, seen(mx.array(noise)), Beam(width, length, 2))
    want = on_paper(table, width, length, noise)
    assert paths_of(candidates) == [path for level in want for path in level]
    plain = on_paper(random_table(3), width, length)
    assert [[*level] for level in plain] != [[*level] for level in want] or length == 2


def test_calibration_changes_probabilities_of_one_beam_but_not_its_tokens() -> None:
    plain = search(random_table(0), seen(), Beam(1, 4))
    calibrated = search(random_table(0, calibration=(2.0, 2.0, 2.0)), seen(), Beam(1, 4))
    assert mx.array_equal(plain.tokens, calibrated.tokens)
    assert not mx.allclose(plain.logprobs, calibrated.logprobs)


@pytest.mark.parametrize("has_noise", [False, True])
def test_a_reduced_vocabulary_drafts_the_targets_tokens(has_noise: bool) -> None:
    """The recurrence is fed with them, and the noise is that of the target's tokens."""
    ids = np.random.default_rng(0).permutation(50)[:12]
    table = random_table(0, target_ids=mx.array(ids, dtype=mx.int32))
    noise = np.random.default_rng(1).gumbel(size=(3, 50)).astype(np.float32) if has_noise else None
    given = seen(None if noise is None else mx.array(noise), root=int(ids[2]))
    candidates = search(table, given, Beam(4, 4, 2))
    want = on_paper(table, 4, 4, None if noise is None else noise[:, ids])
    assert paths_of(candidates) == [tuple(ids[list(path)].tolist()) for level in want for path in level]
    assert table.fed == [[int(ids[path[-1]]) for path in level] for level in want[:-1]]


def test_a_beam_as_wide_as_the_vocabulary_and_no_wider() -> None:
    table: Recurrence[Any] = random_table(0, vocab=3)
    assert mx.sort(search(table, seen(), Beam(3, 2)).tokens).tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="at most the drafter's vocabulary 3, not 4"):
        search(table, seen(), Beam(4, 2))
    with pytest.raises(ValueError, match="at most the drafter's vocabulary 3, not 4"):
        beams(table, mx.array([1.0]), 2, 4, 2)


def test_a_drafter_searches_with_its_own_calibration_and_vocabulary() -> None:
    target = make_target()
    drafter = make_drafter(target, draft_vocab_size=10)
    drafter.d2t = mx.full((10,), 40, dtype=mx.int32)
    drafter.config = changed(drafter.config, calibration=(0.1, 3.0))
    assert drafter.max_width == 10 and drafter.max_length is None and not drafter.needs_text
    context, root = mx.random.normal((32,), key=mx.random.key(0)), mx.array(3, dtype=mx.int32)
    noise = mx.random.gumbel((3, 64), key=mx.random.key(1))
    chain = drafter.start([1, 2]).draft(Seen(context, root, noise), Beam(1, 4))
    drafted: list[int] = np.append(3, np.array(chain.tokens)).tolist()
    assert all(40 <= token < 50 for token in drafted[1:])
    logits = drafter.logits(context[None], mx.array([drafted[:3]]), target.embed)[0]
    for depth, c in enumerate((0.1, 3.0, 1.0)):  # beyond what was calibrated: as they are
        scores = logits[depth] / c + noise[depth, 40:50]
        assert drafted[depth + 1] == 40 + int(mx.argmax(scores).item())


@pytest.mark.parametrize(
    ("size", "k"),
    [(size, k) for size in (1, 2, 7, 64, 1000, 4099) for k in (1, 2, 5, 16, 64) if k <= size],
)
def test_top_k_is_the_front_of_a_sort(size: int, k: int) -> None:
    x = np.random.default_rng(size).permutation(size).astype(np.float32)  # no two are equal
    values, indices = top_k(mx.array(x), k)
    want = np.argsort(-x)[:k]
    assert (
        indices.dtype == mx.int32
        and indices.tolist() == want.tolist()
        and values.tolist() == x[want].tolist()
    )


@pytest.mark.parametrize("k", [1, 3, 16])
def test_top_k_of_equal_values_names_each_once(k: int) -> None:
    for x in (mx.zeros((500,)), mx.array([0.0, 1.0] * 250), mx.full((500,), -math.inf)):
        values, indices = top_k(x, k)
        assert len(set(indices.tolist())) == k
        assert values.tolist() == [x.max().item()] * k and mx.array_equal(x[indices], values)


@pytest.mark.parametrize("place", [0, 1, 499, 960, 998, 999])
def test_top_k_finds_the_largest_wherever_it_lies(place: int) -> None:
    """Also in the short chunk at the end."""
    x = mx.zeros((1000,))
    x[place] = 5.0
    values, indices = top_k(x, 4)
    assert indices[0].item() == place and values.tolist() == [5.0, 0.0, 0.0, 0.0]

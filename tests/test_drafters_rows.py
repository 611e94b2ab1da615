"""Drafters that read every committed row: what decoding shows them, and that a kept prompt cache leaves no gap."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest

from tests.heads import HYDRA, make_hydra, make_often_right
from tests.toy import VOCAB, make_target

# isort: split
import mlx.core as mx
import numpy as np

from redrafter_mlx import decode
from redrafter_mlx.drafters.hydra import Hydra, PrefixedText
from redrafter_mlx.drafters.interface import Rows, Seen
from redrafter_mlx.drafters.prefix import BLOCK
from redrafter_mlx.generation import Model, PromptCache, generate, stream_generate
from redrafter_mlx.policy import Policy
from redrafter_mlx.sampling import Sampling
from redrafter_mlx.target import Target
from redrafter_mlx.tree import Beam, Candidates

PROMPT = [5, 9, 33, 2, 17]


class Reader(PrefixedText):
    """Notes what it was shown, and what it drafted."""

    def __init__(self, drafter: Hydra) -> None:
        super().__init__(drafter)
        self.rows: list[Rows] = []
        self.drafts: list[tuple[Seen, Beam, Candidates]] = []

    def observe(self, rows: Rows) -> None:
        super().observe(rows)
        self.rows.append(rows)

    def draft(self, seen: Seen, beam: Beam) -> Candidates:
        found = super().draft(seen, beam)
        if seen.position is not None:
            self.drafts.append((seen, beam, found))
        return found


def reading(target: Target) -> tuple[Model, list[Reader]]:
    """A model with an often right Hydra++, and the readers of its texts, to which each new one is added."""
    drafter, readers = make_often_right(target), list[Reader]()

    def start(tokens: Sequence[int]) -> Reader:
        readers.append(Reader(drafter))
        return readers[-1]

    drafter.start = start  # type: ignore[method-assign]
    model = Model(target, drafter)
    readers.clear()  # that of the trial when a model is made
    return model, readers


@pytest.mark.parametrize(
    ("family", "name"),
    [("llama", "prefix_four_layers"), ("llama", "prefix_not_grounded"), ("gemma3", "often_right"),
     ("llama_window", "often_right")],
)  # fmt: skip
def test_drafted_is_plain(family: str, name: str) -> None:
    """With one wait for the device in each step, as with any other drafter."""
    target = make_target(family)
    drafter = make_often_right(target) if name == "often_right" else make_hydra(**HYDRA[name])
    drafter.eval()
    drafter.attach(target)
    model, accepted = Model(target, drafter), 0
    for sampling in (Sampling(), Sampling(temperature=0.8, seed=3)):
        _, plain = generate(model, PROMPT, max_tokens=32, sampling=sampling, draft="off")
        assert len(set(plain.token_ids)) > 4, "a degenerate text would prove nothing"
        for draft in ("1x4", "3x4", "8x4@16", "16x3@12"):
            _, stats = generate(model, PROMPT, max_tokens=32, sampling=sampling, draft=draft)
            assert stats.token_ids == plain.token_ids and stats.syncs == stats.steps, draft
            accepted += stats.accepted_tokens
    assert accepted > 0


def shown(reader: Reader) -> tuple[np.ndarray, list[int]]:
    """All rows that count, and the tokens there: those of a step reach to where the next ones begin."""
    contexts: list[np.ndarray] = []
    tokens: list[int] = []
    for rows in reader.rows:
        del contexts[rows.start :], tokens[rows.start :]
        assert len(contexts) == rows.start
        count = rows.contexts.shape[0] if rows.count is None else int(rows.count.item())
        contexts += list(np.array(rows.contexts[:count]))
        tokens += np.array(rows.tokens[:count]).tolist()
    return np.stack(contexts), tokens


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("draft", ["1x4", "3x4", "8x4@16"])
def test_a_drafter_is_shown_every_row_once(family: str, draft: str) -> None:
    target = make_target(family)
    model, readers = reading(target)
    for sampling in (Sampling(), Sampling(temperature=0.9, seed=5)):
        _, stats = generate(model, PROMPT, max_tokens=40, sampling=sampling, draft=draft)
        contexts, tokens = shown(readers[-1])
        text = [*PROMPT, *stats.token_ids]
        assert tokens == text[: len(tokens)] and len(text) - 4 <= len(tokens)
        want = np.array(target.contexts(mx.array([text]))[0, : len(tokens)])
        np.testing.assert_allclose(contexts, want, atol=1e-3)
        if family == "llama":
            assert stats.accepted_tokens > 3, "nothing accepted would prove nothing"
    assert len(readers) == 2


def test_rows_of_plain_steps_and_of_a_long_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafting that pauses, and a prompt in several blocks, with more rows than wait for a draft."""
    target = make_target()
    model, readers = reading(target)
    prompt = np.random.default_rng(0).integers(0, VOCAB, 300).tolist()
    monkeypatch.setattr(decode.prefill, "__defaults__", (64,))

    class Pausing(Policy):
        """Drafts in steps 0 to 4 of every 30."""

        steps = 0

        def shape(self) -> Beam | None:
            self.steps += 1
            return Beam(3, 4, 8) if self.steps % 30 < 5 else None

    monkeypatch.setattr("redrafter_mlx.generation.make_policy", lambda *_: Pausing())
    _, stats = generate(model, prompt, max_tokens=150)
    monkeypatch.undo()
    reader = readers[-1]
    assert sum(rows.start < 300 for rows in reader.rows) == 6 and 300 > BLOCK
    contexts, tokens = shown(reader)
    text = [*prompt, *stats.token_ids]
    assert tokens == text[: len(tokens)]
    np.testing.assert_allclose(
        contexts, np.array(target.contexts(mx.array([text]))[0, : len(tokens)]), atol=1e-3
    )
    assert stats.token_ids == generate(model, prompt, max_tokens=150, draft="off")[1].token_ids
    assert 20 < len(reader.drafts) < stats.steps - 50
    check_drafts(target, reader, text)


def check_drafts(target: Target, reader: Reader, text: list[int], first: int = 0) -> int:
    """Compare every draft from the `first` on with that of a fresh reader that is shown all rows at once; returns how
    many there were.
    """
    contexts = target.contexts(mx.array([text]))[0]
    for seen, beam, found in reader.drafts[first:]:
        assert seen.position is not None
        length = int(seen.position.item())
        if length >= len(text):  # queued for a step that was not wanted any more
            continue
        assert int(seen.root.item()) == text[length]
        fresh = PrefixedText(reader.drafter)
        fresh.observe(Rows(contexts[:length], mx.array(text[:length]), 0))
        again = Seen(contexts[length - 1], seen.root, seen.noise, seen.position)
        want = fresh.draft(again, beam)
        assert np.array(found.tokens).tolist() == np.array(want.tokens).tolist()
        np.testing.assert_allclose(found.logprobs, want.logprobs, atol=1e-3)
    return len(reader.drafts[first:])


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_turns_on_a_kept_prompt_cache(family: str) -> None:
    """The drafter goes on with the rows that the cache's positions gave it: no gap, and the drafts of a fresh text.
    Turn 3 leaves the text of turn 2, and turn 5 follows one without drafts, whose rows must be processed again.
    """
    target = make_target(family)
    model, readers = reading(target)
    cache, prompt, accepted = PromptCache(), list(PROMPT), 0
    for turn, draft in enumerate(("3x4", "3x4", "3x4", "off", "3x4")):
        if turn == 2:
            prompt = [*prompt[:9], 1, 2]
        length, first = len(cache.tokens), len(readers[-1].drafts) if readers else 0
        _, stats = generate(model, prompt, max_tokens=20, draft=draft, cache=cache)
        text = [*prompt, *stats.token_ids]
        assert stats.token_ids == generate(model, prompt, max_tokens=20, draft="off")[1].token_ids
        if draft != "off":
            assert check_drafts(target, readers[-1], text, first) > 3
            accepted += stats.accepted_tokens
        if turn in (1, 3):
            assert stats.reused_tokens >= length - 1
        if turn == 2:
            assert stats.reused_tokens in (9, 0)  # 0: a window had dropped them
        if turn == 4:
            assert stats.reused_tokens < len(prompt) - 20, (
                "the rows of a turn without drafts were never shown"
            )
        prompt = [*text, 3, 4]
    assert accepted > 5
    if family == "llama":
        assert len(readers) == 1, "nothing was dropped, so one reader serves all turns"


def test_acceptance_after_a_turn_is_that_of_a_fresh_text() -> None:
    target = make_target()
    model, _ = reading(target)
    cache = PromptCache()
    sampling = Sampling(temperature=1.0, seed=2)
    _, first = generate(model, PROMPT, max_tokens=60, sampling=sampling, draft="8x4@16", cache=cache)
    prompt = [*PROMPT, *first.token_ids, 8, 1]
    _, kept = generate(model, prompt, max_tokens=60, sampling=sampling, draft="8x4@16", cache=cache)
    _, fresh = generate(model, prompt, max_tokens=60, sampling=sampling, draft="8x4@16")
    assert kept.reused_tokens >= len(prompt) - 3 and fresh.reused_tokens == 0
    assert kept.token_ids == fresh.token_ids and kept.accepted_by_depth == fresh.accepted_by_depth
    assert kept.accepted_tokens > 5


def test_a_turn_that_is_given_up_leaves_no_gap() -> None:
    """After any number of tokens: of the step under way, what was shown is taken back with the cache."""
    target = make_target()
    model, readers = reading(target)
    want = generate(model, PROMPT, max_tokens=30, draft="off")[1].token_ids
    for count in range(1, 12):
        cache = PromptCache()
        stream = stream_generate(model, PROMPT, max_tokens=30, draft="8x4@16", cache=cache)
        tokens = [next(stream).token for _ in range(count)]
        stream.close()  # type: ignore[attr-defined]
        reader = readers[-1]
        first = len(reader.drafts)
        prompt = [*PROMPT, *tokens]
        _, stats = generate(model, prompt, max_tokens=30 - count, draft="8x4@16", cache=cache)
        assert tokens + stats.token_ids == want and readers[-1] is reader
        check_drafts(target, reader, [*PROMPT, *want], first)


def test_another_drafter_does_not_go_on_with_its_rows() -> None:
    target = make_target()
    model, readers = reading(target)
    other, others = reading(target)
    cache = PromptCache()
    _, first = generate(model, PROMPT, max_tokens=20, draft="3x4", cache=cache)
    prompt = [*PROMPT, *first.token_ids, 3]
    _, stats = generate(other, prompt, max_tokens=20, draft="3x4", cache=cache)
    assert stats.reused_tokens == 0 and len(readers) == len(others) == 1
    assert check_drafts(target, others[0], [*prompt, *stats.token_ids]) > 3


def test_turning_drafts_off_shows_nothing() -> None:
    """Plain decoding does not pay for a drafter that it does not use."""
    model, readers = reading(make_target())
    generate(model, PROMPT, max_tokens=10, draft="off")
    assert not readers


def test_another_thread_goes_on_with_what_was_shown() -> None:
    """Rows that wait for a draft were asked for by a thread that may have ended since."""
    target = make_target()
    drafter = make_often_right(target)
    text, tokens = PrefixedText(drafter), mx.array(PROMPT)
    mx.eval(tokens)
    Model(target, drafter)  # which evaluates all weights, as any thread's first use of a model does

    def show() -> None:
        contexts = target.contexts(tokens[None])[0]
        text.observe(Rows(contexts[:3], tokens[:3], 0))
        text.draft(Seen(contexts[2], tokens[3], None, mx.array(3, dtype=mx.int32)), Beam(1, 2, 2))
        text.observe(Rows(contexts[3:], tokens[3:], 3))
        text.launch()

    thread = threading.Thread(target=show)
    thread.start()
    thread.join()
    contexts = target.contexts(tokens[None])[0]
    fresh = PrefixedText(drafter)
    fresh.observe(Rows(contexts, tokens, 0))
    seen = Seen(contexts[4], mx.array(7), None, mx.array(5, dtype=mx.int32))
    got, want = (each.draft(seen, Beam(2, 4)) for each in (text, fresh))
    np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-4)

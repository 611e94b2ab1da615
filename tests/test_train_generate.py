"""Batched decoding by the target."""

from __future__ import annotations

import numpy as np

from redrafter_mlx.train.generate import generate_batch, sample
from redrafter_mlx.train.rows import LoopWatch, Row, loop_start

from .toy import make_target
from .training import (
    EOS,
)

# isort: split
import mlx.core as mx


def test_a_loop_is_noticed_at_its_twelfth_repeated_window() -> None:
    text = list(range(100, 120)) + [1, 2, 3, 4, 5] * 20
    # windows of 8 that lie in the loop: the first five are new (period 5), those after repeat.
    # The first ends at token 20 + 8, the fifth at 20 + 12, so the twelfth repeat at 20 + 24.
    assert loop_start(text) == 20 + 12 + 12


def test_text_without_a_loop_is_kept_whole() -> None:
    assert loop_start(list(range(300))) == 300
    assert loop_start([]) == 0


def test_a_repeat_that_breaks_off_is_not_a_loop() -> None:
    phrase = list(range(18))  # 11 windows of 8: one repeat fewer than a loop takes
    watch = LoopWatch()
    assert not any(watch.push(token) for token in phrase + [50] + phrase + [51] + phrase + [52])


def test_sampling_inverts_the_cumulative_distribution() -> None:
    logits = np.log(np.array([[0.2, 0.5, 0.3]], dtype=np.float32)).repeat(4, axis=0)
    uniforms = np.array([0.1, 0.21, 0.69, 0.71])
    assert sample(logits, np.ones(4), 0, uniforms).tolist() == [0, 1, 1, 2]
    assert sample(logits, np.zeros(4), 0, uniforms).tolist() == [1, 1, 1, 1]
    # of the two likeliest, renormalized: 0.625 and 0.375
    assert sample(logits, np.ones(4), 2, uniforms).tolist() == [1, 1, 2, 2]


def test_lockstep_decoding_is_the_targets_own_greedy_text() -> None:
    """Prompts of different lengths in one batch, against one forward of each whole text alone."""
    target = make_target()
    target.watch((0, 2))
    prompts = [(1, 5, 6), (1, 5, 6, 7, 8, 9, 10), (1, 5, 40, 41)]
    rows = [Row(prompt, 20, 0.0) for prompt in prompts]
    for prompt, text in zip(
        prompts, generate_batch(target, rows, frozenset({EOS}), np.random.default_rng(0)), strict=True
    ):
        whole = mx.array([[*prompt, *text.tokens]])
        logits = np.array(target.model(whole)[0])
        contexts = np.array(target.contexts(whole)[0].astype(mx.float32))
        begin = len(prompt) - 1
        end = begin + len(text.tokens)
        assert logits[begin:end].argmax(axis=-1).tolist() == text.tokens
        np.testing.assert_allclose(contexts[begin:end], np.stack(text.contexts), rtol=2e-3, atol=5e-3)


def test_a_text_ends_with_its_stop_token() -> None:
    target = make_target()
    row = Row((1, 5, 6), 20, 0.0)
    free = generate_batch(target, [row], frozenset(), np.random.default_rng(0))[0]
    stop = free.tokens[4]
    text = generate_batch(target, [row], frozenset({stop}), np.random.default_rng(0))[0]
    assert text.stopped and not free.stopped
    assert text.tokens == free.tokens[: free.tokens.index(stop) + 1]

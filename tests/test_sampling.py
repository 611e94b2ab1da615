"""Sampling: the filters are mlx-lm's, the noise is keyed by position, the draws follow the target."""

from __future__ import annotations

import pytest

from tests.toy import VOCAB, make

# isort: split
import mlx.core as mx
import numpy as np
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p

from redrafter_mlx.generation import generate
from redrafter_mlx.sampling import PositionNoise, Sampler, Sampling, choose, filtered, gumbel, penalized
from redrafter_mlx.tree import TokenTree


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("size", [7, 1000])
def test_top_p_is_mlx_lms(top_p: float, size: int) -> None:
    mx.random.seed(size)
    logits = mx.random.normal((5, size)) * 3
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    want = mx.isfinite(apply_top_p(logprobs, top_p))
    got = mx.isfinite(filtered(logits, Sampling(temperature=1.0, top_p=top_p)))
    # the sums run in another order, so a token whose cumulative mass is top_p to 1e-6 may fall on either
    # side
    assert (want != got).sum().item() <= 1
    kept = mx.where(got, mx.softmax(logits, axis=-1), 0).sum(axis=-1)
    assert mx.all(kept >= top_p - 1e-5).item()


@pytest.mark.parametrize("k", [1, 2, 40, 999])
def test_top_k_is_mlx_lms(k: int) -> None:
    mx.random.seed(k)
    logits = mx.random.normal((4, 1000)) * 3
    got = mx.isfinite(filtered(logits, Sampling(temperature=1.0, top_k=k)))
    assert mx.array_equal(got, mx.isfinite(apply_top_k(logits, k)))


def test_min_p_is_mlx_lms() -> None:
    logits = mx.random.normal((4, 300)) * 3
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    got = mx.isfinite(filtered(logits, Sampling(temperature=1.0, min_p=0.05)))
    assert mx.array_equal(got, mx.isfinite(apply_min_p(logprobs, 0.05)))


def test_noise_is_a_function_of_seed_and_position() -> None:
    block = gumbel(9, mx.array([4, 5, 6], dtype=mx.int32), 100)
    assert mx.array_equal(block[1:2], gumbel(9, mx.array([5], dtype=mx.int32), 100))
    assert not mx.array_equal(block[1:2], gumbel(10, mx.array([5], dtype=mx.int32), 100))
    assert not mx.array_equal(block[0], block[1])


def test_choices_follow_the_distribution() -> None:
    """Chi-squared over 20,000 seeds-and-positions; the bound is exceeded by chance once in 10,000 times."""
    logits = mx.array([[1.0, 0.0, -1.0, 2.0, 0.5]])
    noise = mx.concatenate([gumbel(seed, mx.arange(2000, dtype=mx.int32), 5) for seed in range(10)])
    sampling = Sampling(temperature=0.7)
    draws = np.array(choose(mx.broadcast_to(logits, noise.shape), sampling, noise))
    p = np.array(mx.softmax(logits[0] / 0.7))
    counts = np.bincount(draws, minlength=5)
    assert ((counts - 20000 * p) ** 2 / (20000 * p)).sum() < 23.5  # 4 degrees of freedom


def test_speculative_samples_follow_the_target() -> None:
    """First drafted position over many seeds against the exact distribution of the toy target
    (chi-squared).
    """
    model = make("llama")
    prompt = [3, 1, 4]
    logits = model.target.model(mx.array([prompt]))[0, -1]
    p_first = np.array(mx.softmax(logits / 2.0))
    first = int(p_first.argmax())
    second = model.target.model(mx.array([[*prompt, first]]))[0, -1]
    p = np.array(mx.softmax(second / 2.0))
    seconds = []
    for seed in range(600):
        sampling = Sampling(temperature=2.0, seed=seed)
        _, stats = generate(model, prompt, max_tokens=3, sampling=sampling, draft="4x2")
        if stats.token_ids[0] == first:
            seconds.append(stats.token_ids[1])
    n = len(seconds)
    assert n > 60
    common = np.argsort(-p)[:4]
    observed = np.array([np.sum(np.array(seconds) == t) for t in common])
    observed = np.append(observed, n - observed.sum())
    expected = n * np.append(p[common], 1 - p[common].sum())
    assert ((observed - expected) ** 2 / expected).sum() < 23.5  # 4 degrees of freedom, 1 in 10,000


def test_greedy_is_argmax() -> None:
    assert choose(mx.array([[0.0, 3.0, 1.0]]), Sampling(), None).item() == 1


def test_penalties_use_each_nodes_own_history() -> None:
    logits = mx.array([[2.0, -2.0, 1.0, 1.0]] * 3)
    mask = mx.array([[True, False, False], [True, True, False], [True, False, True]])
    parents, depth = mx.array([0, 0, 0]), mx.array([0, 1, 1])
    tree = TokenTree(mx.array([1, 2, 3]), parents, depth, mask, 1)  # root 1, branches 2 and 3
    sampling = Sampling(repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25)
    bias = mx.array([0.0, 0.0, 0.0, 10.0])
    got = penalized(logits, sampling, mx.array([1.0, 0, 0, 0]), mx.zeros((4,)), tree, bias)
    # token 0 was in the prompt only: repetition alone; token 1 is in all histories
    want = [
        [1.0, -4.75, 1.0, 11.0],
        [1.0, -4.75, 0.5 - 0.75, 11.0],
        [1.0, -4.75, 1.0, 5.5 - 0.75],
    ]
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_a_samplers_counts_add_up() -> None:
    """Two tokens said once and twice are held back once and twice; those of the prompt are not."""
    sampler = Sampler(Sampling(frequency_penalty=1.0, logit_bias={9: 0.5}), VOCAB, [3, 3, 4])
    sampler.commit(mx.array([5, 6, 6]))
    logits = mx.zeros((1, VOCAB))
    logits[0, 3], logits[0, 5], logits[0, 6] = 0.1, 1.4, 2.6
    assert sampler.first(logits, None).item() == 6
    sampler.commit(mx.array([6]))
    assert sampler.first(logits, None).item() == 9


def test_bias_of_many_tokens_is_one_addition() -> None:
    sampling = Sampling(logit_bias={token: -1e6 for token in range(VOCAB) if token != 11})
    sampler = Sampler(sampling, VOCAB, [1])
    assert sampler.first(mx.random.normal((1, VOCAB)), None).item() == 11


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -1}, {"temperature": float("nan")}, {"top_p": 1.5}, {"top_k": -1}, {"min_p": 2},
        {"seed": -1}, {"seed": 2**64}, {"seed": 1.5}, {"seed": True}, {"top_k": True}, {"top_k": 2.0},
        {"temperature": "1"}, {"temperature": float("inf")}, {"repetition_penalty": 0},
        {"repetition_penalty": float("inf")}, {"presence_penalty": float("nan")},
        {"frequency_penalty": float("-inf")}, {"logit_bias": {3: float("nan")}}, {"logit_bias": {"a": 1.0}},
        {"logit_bias": {3.5: 1.0}}, {"logit_bias": [1, 2]},
    ],
)  # fmt: skip
def test_impossible_settings(values: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        Sampling(**values)


def test_without_a_seed_every_call_differs_and_reports_it() -> None:
    model = make("llama")
    runs = [generate(model, [1, 2], max_tokens=20, sampling=Sampling(temperature=2.0))[1] for _ in range(2)]
    assert runs[0].seed != runs[1].seed and runs[0].token_ids != runs[1].token_ids
    again = Sampling(temperature=2.0, seed=runs[0].seed)
    assert generate(model, [1, 2], max_tokens=20, sampling=again)[1].token_ids == runs[0].token_ids


def test_noise_buffer_gives_every_position_its_own_row() -> None:
    """Whatever was asked before, a row is the one its seed and position make."""
    buffer = PositionNoise(9, 50)
    for low, positions in ((4, [4]), (5, [6, 7, 5]), (7, [20, 8]), (30, [31]), (31, [31, 33])):
        got = buffer.at(mx.array(positions, dtype=mx.int32), low, max(positions) + 1)
        assert mx.array_equal(got, gumbel(9, mx.array(positions, dtype=mx.int32), 50))


def test_bias_of_a_token_that_is_not_there_is_refused_before_any_work() -> None:
    model = make("llama")
    for token in (-1, VOCAB):
        with pytest.raises(ValueError, match=f"logit_bias must name tokens in 0..{VOCAB - 1}, not {token}"):
            generate(model, [1], sampling=Sampling(logit_bias={token: 1.0}))


def test_keys_as_json_has_them() -> None:
    assert Sampling(logit_bias={"7": 2}).logit_bias == {7: 2.0}  # type: ignore[dict-item]


def test_extremes_take_the_most_probable_token() -> None:
    logits = mx.random.normal((6, VOCAB)) * 3
    noise = gumbel(1, mx.arange(6, dtype=mx.int32), VOCAB)
    want = mx.argmax(logits, axis=-1).tolist()
    assert choose(logits, Sampling(temperature=1e-40, seed=1), noise).tolist() == want
    assert choose(logits, Sampling(temperature=1.0, top_p=0.0, seed=1), noise).tolist() == want
    assert choose(logits, Sampling(temperature=1.0, top_k=1, seed=1), noise).tolist() == want


def test_all_bits_of_a_seed_count() -> None:
    position = mx.arange(3, dtype=mx.int32)
    seeds = [0, 1, 2**32, 2**32 + 1, 2**33, 2**63, 2**64 - 1]
    rows = [tuple(gumbel(seed, position, 8).reshape(-1).tolist()) for seed in seeds]
    assert len(set(rows)) == len(seeds)


def test_a_sampler_knows_its_vocabulary() -> None:
    with pytest.raises(ValueError, match="logit_bias must name tokens in 0..3, not 4"):
        Sampler(Sampling(logit_bias={4: 1.0}), 4, [])

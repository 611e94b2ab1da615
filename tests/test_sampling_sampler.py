"""The choice of a token: draws follow the target, with and without a draft, and counts add up."""

from __future__ import annotations

import pytest

from tests.toy import VOCAB, make

# isort: split
import mlx.core as mx
import numpy as np

from redrafter_mlx.generation import generate
from redrafter_mlx.sampling import Sampler, Sampling
from redrafter_mlx.sampling.noise import gumbel
from redrafter_mlx.sampling.sampler import choose


def test_greedy_is_argmax() -> None:
    assert choose(mx.array([[0.0, 3.0, 1.0]]), Sampling(), None).item() == 1


def test_extremes_take_the_most_probable_token() -> None:
    logits = mx.random.normal((6, VOCAB)) * 3
    noise = gumbel(1, mx.arange(6, dtype=mx.int32), VOCAB)
    want = mx.argmax(logits, axis=-1).tolist()
    assert choose(logits, Sampling(temperature=1e-40, seed=1), noise).tolist() == want
    assert choose(logits, Sampling(temperature=1.0, top_p=0.0, seed=1), noise).tolist() == want
    assert choose(logits, Sampling(temperature=1.0, top_k=1, seed=1), noise).tolist() == want


def test_choices_follow_the_distribution() -> None:
    """Chi-squared over 20,000 seeds-and-positions; the bound is exceeded by chance once in 10,000 times."""
    logits = mx.array([[1.0, 0.0, -1.0, 2.0, 0.5]])
    noise = mx.concatenate([gumbel(seed, mx.arange(2000, dtype=mx.int32), 5) for seed in range(10)])
    sampling = Sampling(temperature=0.7)
    draws = np.array(choose(mx.broadcast_to(logits, noise.shape), sampling, noise))
    p = np.array(mx.softmax(logits[0] / 0.7))
    counts = np.bincount(draws, minlength=5)
    assert ((counts - 20000 * p) ** 2 / (20000 * p)).sum() < 23.5  # 4 degrees of freedom


@pytest.mark.slow
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


def test_without_a_seed_every_call_differs_and_reports_it() -> None:
    model = make("llama")
    runs = [generate(model, [1, 2], max_tokens=20, sampling=Sampling(temperature=2.0))[1] for _ in range(2)]
    assert runs[0].seed != runs[1].seed and runs[0].token_ids != runs[1].token_ids
    again = Sampling(temperature=2.0, seed=runs[0].seed)
    assert generate(model, [1, 2], max_tokens=20, sampling=again)[1].token_ids == runs[0].token_ids


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


def test_a_sampler_knows_its_vocabulary() -> None:
    with pytest.raises(ValueError, match="logit_bias must name tokens in 0..3, not 4"):
        Sampler(Sampling(logit_bias={4: 1.0}), 4, [])

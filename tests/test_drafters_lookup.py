"""Lookup: what it offers, what it learns of its own hits, and that text stays the same whatever it offers."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tests.toy import make_often_right, make_target

# isort: split
import mlx.core as mx
import numpy as np

from redrafter_mlx.drafters.lookup import LEAST_PROB, HitRates, Lookup, Offer, TextLookup
from redrafter_mlx.generation import Model, generate
from redrafter_mlx.sampling import Sampling
from redrafter_mlx.target import Target
from redrafter_mlx.tree import NEVER, Beam


def test_the_longest_match_is_continued() -> None:
    text = Lookup().start([1, 2, 3, 4, 9, 3, 7, 2, 3])
    offer = text.offer(Beam(1, 4))
    assert offer is not None
    assert offer.tokens == [4, 9, 3] and offer.parents == [-1, 0, 1] and offer.height == 3


def test_path_probabilities_are_products_of_measured_shares() -> None:
    lookup = Lookup()
    text = lookup.start([1, 2, 3, 4, 9, 2, 3])
    offer = text.offer(Beam(1, 3))
    share = lookup.rates[True].text.share
    assert offer is not None and offer.probs == pytest.approx([share(2), share(2) * share(3)])


def test_two_continuations_share_their_beginning() -> None:
    text = Lookup().start([1, 2, 5, 6, 1, 2, 5, 7, 1, 2])
    offer = text.offer(Beam(2, 4))
    assert offer is not None
    paths = {(offer.tokens[i], offer.parents[i]) for i in range(len(offer.tokens))}
    assert (5, -1) in paths and len([token for token in offer.tokens if token == 5]) == 1
    assert {6, 7} <= set(offer.tokens)
    assert all(offer.probs[i] <= offer.probs[p] for i, p in enumerate(offer.parents) if p >= 0)


def test_what_is_improbable_is_not_followed() -> None:
    lookup = Lookup()
    for _ in range(3000):
        lookup.rates[True].text.observe(1, False)
    assert lookup.rates[True].text.share(1) < LEAST_PROB
    assert lookup.start([3, 8, 3]).offer(Beam(1, 4)) is None


def test_hits_are_counted_by_the_length_of_the_match_that_foretold_them() -> None:
    lookup = Lookup()
    before = [lookup.rates[True].text.share(length) for length in range(1, 17)]
    text = lookup.start([1, 2, 3, 4, 5, 1])
    text.keep([2, 3, 9])  # 2 and 3 were foretold after matches of 1 and 2 tokens, 9 was not after one of 3
    after = [lookup.rates[True].text.share(length) for length in range(1, 17)]
    assert after[0] > before[0] and after[1] > before[1] and after[2] < before[2]
    assert after[3:] == before[3:]
    sampling = lookup.rates[False].text
    assert sampling.share(1) == HitRates(sampling.prior).share(1), "kept apart for greedy and sampling"


def test_a_share_follows_what_happens() -> None:
    rates = HitRates((0.9, 0.9))
    rng = np.random.default_rng(0)
    for right in rng.random(2000) < 0.3:
        rates.observe(5, bool(right))  # longer than any known: the last class
    assert rates.share(2) == pytest.approx(0.3, abs=0.07) and rates.share(1) == 0.9


def test_a_phrase_over_rejected_rows_is_offered_after_its_first_token() -> None:
    text = Lookup().start([1, 2])
    text.learn([7, 8, 9])
    assert text.offer(Beam(1, 4)) is None
    text.keep([7])
    offer = text.offer(Beam(1, 4))
    assert offer is not None and offer.tokens == [8, 9]


def test_an_offer_on_the_device_is_filled_up_with_what_is_not_offered() -> None:
    candidates = Offer([4, 5, 6], [-1, -1, 0], [0.5, 0.25, 0.2], 2).candidates()
    assert candidates.num_candidates == 4 and not candidates.is_chain
    assert candidates.logprobs[3].item() == pytest.approx(NEVER)
    assert np.exp(np.array(candidates.logprobs)[:3]) == pytest.approx([0.5, 0.25, 0.2])
    assert Offer([4, 5], [-1, 0], [0.5, 0.2], 2).candidates().is_chain


def model_of(seed: int, with_drafter: bool, lookup: Lookup) -> Model:
    target = make_target("llama", seed)
    return Model(target, make_often_right(target) if with_drafter else None, lookup=lookup)


class Lying(Lookup):
    """Offers random trees, siblings with equal tokens included, sure of each."""

    def start(self, tokens: Sequence[int], greedy: bool = True) -> TextLookup:
        return _Lies(tokens, self.rates[greedy])


class _Lies(TextLookup):
    def offer(self, beam: Beam) -> Offer | None:
        rng = np.random.default_rng(len(self._index.tokens))
        count = int(rng.integers(0, 8))
        if count == 0:
            return None
        parents = [int(rng.integers(-1, i)) if i else -1 for i in range(count)]
        depths: list[int] = []
        probs: list[float] = []
        for parent in parents:
            depths.append(1 if parent < 0 else depths[parent] + 1)
            probs.append(0.9 if parent < 0 else 0.9 * probs[parent])
        tokens = [self._index.tokens[-1], *rng.integers(0, 4, count - 1).tolist()]
        return Offer(tokens, parents, probs, max(depths))


SAMPLINGS = [
    Sampling(),
    Sampling(temperature=0.7, seed=5),
    Sampling(temperature=1.0, seed=6, top_p=0.9, repetition_penalty=1.3),
]


@pytest.mark.parametrize("lookup", [Lookup, Lying])
@pytest.mark.parametrize("with_drafter", [False, True])
@pytest.mark.parametrize("draft", ["auto", "3x4@6", "2x3", "1x6", "1x2"])
def test_text_is_that_of_plain_decoding(lookup: type[Lookup], with_drafter: bool, draft: str) -> None:
    model = model_of(1, with_drafter, lookup())
    prompt = [3, 4, 5, 6, 3, 4]
    for sampling in SAMPLINGS:
        _, plain = generate(model, prompt, max_tokens=60, sampling=sampling, draft="off")
        _, found = generate(model, prompt, max_tokens=60, sampling=sampling, draft=draft)
        assert found.token_ids == plain.token_ids
        assert plain.drafted_by_source == {}


def test_sources_add_up() -> None:
    model = model_of(2, True, Lookup())
    _, stats = generate(model, [3, 4, 5, 3, 4], max_tokens=120, draft="3x4@8")
    assert sum(stats.drafted_by_source.values()) == stats.drafted_tokens
    assert sum(stats.accepted_by_source.values()) == stats.accepted_tokens
    assert stats.accepted_by_source.get("lookup", 0) > 0


def test_a_text_that_repeats_itself_takes_fewer_steps() -> None:
    """The target says the token's successor, so its text comes round after all tokens of the vocabulary."""
    target = make_target("llama", 3)
    inner = target.model.model
    for layer in inner.layers:
        layer.self_attn.o_proj.weight *= 0
        layer.mlp.down_proj.weight *= 0
    inner.embed_tokens.weight = mx.eye(target.vocab_size, target.hidden_size) + 0.0
    vocab = target.hidden_size  # tokens that have a direction of their own
    target.model.lm_head.weight = mx.concatenate(
        [inner.embed_tokens.weight[vocab - 1 : vocab], inner.embed_tokens.weight[: vocab - 1]]
    )
    model = Model(Target(target.model, "successor", None), lookup=Lookup())
    _, stats = generate(model, [3, 4, 5], max_tokens=4 * vocab, draft="1x8")
    assert stats.token_ids == [(6 + index) % vocab for index in range(4 * vocab)]
    assert stats.tokens_per_step > 2
    assert set(stats.accepted_by_source) == {"lookup"}


def test_lookup_shares_one_figure_between_texts() -> None:
    lookup = Lookup()
    model = model_of(3, False, lookup)
    generate(model, [3, 4, 5], max_tokens=100, draft="1x4")
    assert max(lookup.rates[True].text.seen) > 5
    mx.eval(model.target.model.parameters())

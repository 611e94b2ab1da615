"""Where two texts part: found in the target's own scores, and called a tie only where rounding decides."""

from __future__ import annotations

import pytest

from redrafter_mlx.generation import Model, generate
from redrafter_mlx.measure.divergence import divergence
from redrafter_mlx.sampling import Sampling
from redrafter_mlx.target import Target
from tests.toy import make_model, make_target

PROMPT = [5, 9, 2]
SETTINGS = {
    "greedy": Sampling(),
    "filters": Sampling(temperature=0.7, top_p=0.9, top_k=20, min_p=0.02, seed=3),
    "hot": Sampling(temperature=2.0, seed=5),
    "penalties": Sampling(
        temperature=0.9, seed=7, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.3,
        logit_bias={4: 1.0},
    ),
}  # fmt: skip


def plain_text(target: Target, sampling: Sampling) -> list[int]:
    return generate(Model(target), PROMPT, max_tokens=12, sampling=sampling, draft="off")[1].token_ids


def target_with_twins(token: int, twin: int) -> Target:
    """A target whose two tokens always have the same logit."""
    model = make_model()
    weight = model.lm_head.weight
    weight[twin] = weight[token]
    model.lm_head.weight = weight
    return Target(model, "twins", max_length=512)


def test_equal_texts_do_not_part() -> None:
    assert divergence(make_target(), Sampling(), PROMPT, [1, 2], [1, 2]) is None


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("index", [0, 1, 7, 11])
def test_another_token_is_an_error_and_the_scores_are_those_of_decoding(name: str, index: int) -> None:
    target, sampling = make_target(), SETTINGS[name]
    plain = plain_text(target, sampling)
    probe = divergence(target, sampling, PROMPT, plain, [*plain[:index], -1])
    assert probe is not None and probe.best[0] == plain[index], "the score that decoding took the largest of"
    drafted = [*plain[:index], probe.best[1], *plain[index + 1 :]]
    found = divergence(target, sampling, PROMPT, plain, drafted)
    assert found is not None and found.index == index and found.tokens == found.best
    assert found.scores[0] > found.scores[1] and not found.is_tie


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(logit_bias={1: 2.0})])
def test_twins_are_a_tie_and_a_third_token_is_not(sampling: Sampling) -> None:
    index = 3
    token = plain_text(make_target(), sampling)[index]
    twin = (token + 17) % 64
    target = target_with_twins(token, twin)
    plain = plain_text(target, sampling)
    index = next(i for i, each in enumerate(plain) if each in (token, twin))
    other = twin if plain[index] == token else token
    found = divergence(target, sampling, PROMPT, plain, [*plain[:index], other])
    assert found is not None and found.is_tie and set(found.best) == {token, twin}
    assert str(found.best[0]) in str(found) and f"{found.scores[1]:.7g}" in str(found)
    third = next(each for each in range(64) if each not in (token, twin))
    wrong = divergence(target, sampling, PROMPT, plain, [*plain[:index], third])
    assert wrong is not None and wrong.scores == found.scores and not wrong.is_tie


@pytest.mark.parametrize("cut_plain", [True, False])
def test_a_text_that_ends_early_is_no_tie(cut_plain: bool) -> None:
    target = make_target()
    whole = plain_text(target, Sampling())
    pair = (whole[:5], whole) if cut_plain else (whole, whole[:5])
    found = divergence(target, Sampling(), PROMPT, *pair)
    assert found is not None and found.index == 5 and None in found.tokens and not found.is_tie

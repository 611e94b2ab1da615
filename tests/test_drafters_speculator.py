"""Speculators of IBM's and Snowflake's kinds: their formulas, and that decoding with them changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.speculators import CASES, make_speculator, published, reference
from tests.toy import HIDDEN, VOCAB, make_target

# isort: split
import mlx.core as mx
import numpy as np

import redrafter_mlx as rd
from redrafter_mlx.drafters.beam import beams
from redrafter_mlx.drafters.kinds import load_drafter, load_recurrent, save_drafter
from redrafter_mlx.drafters.quantization import quantize
from redrafter_mlx.drafters.speculator import Speculator, SpeculatorConfig
from redrafter_mlx.files import named_weights
from redrafter_mlx.generation import Model, generate
from redrafter_mlx.sampling import Sampling

PROMPT = [5, 9, 33, 2, 17]


def random_context(seed: int) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(size=HIDDEN).astype(np.float32) * 3)


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_formulas(name: str) -> None:
    """Along one text, and for two beams that change places: the states must follow the slots."""
    speculator = make_speculator(**CASES[name])
    config, context, tokens = speculator.config, random_context(1), [7, 40, 3][: speculator.config.n_predict]
    want = reference(config, published(speculator), np.array(context), tokens)
    state = speculator.begin(context, mx.array(tokens[0]))
    for level in range(config.n_predict):
        got = speculator.logits(state, level)
        assert got.shape == (1, VOCAB) and got.dtype == mx.float32
        np.testing.assert_allclose(got[0], want[level], atol=1e-4)
        if level + 1 < config.n_predict:
            state = speculator.advance(state, mx.array([0]), mx.array(tokens[level + 1 : level + 2]), level)
    if config.n_predict < 3:
        return
    state = speculator.begin(context, mx.array(7))
    state = speculator.advance(state, mx.array([0, 0]), mx.array([40, 50]), 0)
    state = speculator.advance(state, mx.array([1, 0]), mx.array([3, 60]), 1)
    for row, path in enumerate(([7, 50, 3], [7, 40, 60])):
        want = reference(config, published(speculator), np.array(context), path)
        np.testing.assert_allclose(speculator.logits(state, 2)[row], want[2], atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_greedy_chain_through_beam_search(name: str) -> None:
    speculator = make_speculator(**CASES[name])
    config, tensors = speculator.config, published(speculator)
    for seed in range(5):
        context, path, logprob = random_context(seed), [seed], 0.0
        for _ in range(config.n_predict):
            logits = reference(config, tensors, np.array(context), path)[-1]
            logprob += logits.max() - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
            path.append(int(logits.argmax()))
        chain, logprobs = beams(speculator.recurrence(), context, seed, 1, config.n_predict + 1)
        assert chain.tolist() == [path]
        np.testing.assert_allclose(logprobs, [logprob], atol=1e-4)


def test_beams_are_the_best_of_all_paths() -> None:
    """With as many beams as tokens nothing is cut off after two levels, so the search must find the best paths."""
    speculator = make_speculator(vocab_size=6, tie_weights=True, method="sum_lstm")
    config, tensors, context = speculator.config, published(speculator), random_context(3)

    def logprobs(path: list[int]) -> np.ndarray:
        logits = reference(config, tensors, np.array(context), path)[-1]
        return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())

    first = logprobs([4])
    both = np.array([first[a] + logprobs([4, a]) for a in range(6)]).reshape(-1)
    best = np.argsort(-both)[:6]
    found, scores = beams(speculator.recurrence(), context, 4, 6, 3)
    assert found.tolist() == [[4, *divmod(int(i), 6)] for i in best]
    np.testing.assert_allclose(scores, both[best], atol=1e-4)


@pytest.mark.parametrize("name", ["mlp", pytest.param("mlp_tied", marks=pytest.mark.slow), "lstm_scaled"])
@pytest.mark.parametrize("family", ["llama", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_drafted_is_plain(family: str, name: str) -> None:
    target, speculator = make_target(family), make_speculator(**CASES[name])
    speculator.eval()
    speculator.attach(target)
    model, accepted = Model(target, speculator), 0
    for sampling in (Sampling(), Sampling(temperature=0.8, seed=3)):
        _, plain = generate(model, PROMPT, max_tokens=48, sampling=sampling, draft="off")
        assert len(set(plain.token_ids)) > 4, "a degenerate text would prove nothing"
        for draft in ("1x4", "3x4", "8x4@16", "16x3"):
            _, stats = generate(model, PROMPT, max_tokens=48, sampling=sampling, draft=draft)
            assert stats.token_ids == plain.token_ids, draft
            accepted += stats.accepted_tokens
    assert accepted > 0


def test_layout_for_search_changes_no_beam() -> None:
    """Large enough that its products are cut into tiles where this machine's BLAS has that."""
    target, context = make_target(), random_context(4)
    speculator = make_speculator(inner_size=64, **CASES["lstm_tied"])
    want, scores = beams(speculator.recurrence(), context, 1, 4, 4)
    speculator.eval()
    speculator.attach(target)
    got, others = beams(speculator.recurrence(), context, 1, 4, 4)
    assert got.tolist() == want.tolist()
    np.testing.assert_allclose(others, scores, atol=1e-4)


def test_no_beam_is_longer_than_its_stages() -> None:
    target, speculator = make_target(), make_speculator()
    speculator.attach(target)
    model = Model(target, speculator)
    assert speculator.max_length == 4 and speculator.max_width == VOCAB
    with pytest.raises(ValueError, match="beam length must be at most 4 with this drafter, not 5"):
        rd.stream_generate(model, PROMPT, draft="2x5")
    assert len(list(rd.stream_generate(model, PROMPT, max_tokens=5, draft="2x4"))) == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 16}, r"hidden_size is 16 \(made for another model\), the target has 32"),
        (
            {"vocab_size": 60, "target": {"name": "sixty"}},
            r"vocab_size is 60 \(made for sixty\), the target has 64",
        ),
    ],
)
def test_another_target_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_speculator(**changes).attach(make_target())


def test_attaching_ends_the_watch_of_an_earlier_drafter() -> None:
    target = make_target()
    target.watch((0, 1))
    make_speculator().attach(target)
    assert target.context_layers == ()


def test_cost_and_bytes() -> None:
    """A level reads one projection and one head; what it costs does not depend on what it was made for."""
    head, later, first = 64 * 48, 48 * 48, 48 * 32
    untied, lstm = make_speculator(), make_speculator(**CASES["lstm_tied"])
    assert untied.nbytes == 4 * (3 * head + 2 * later + first) // 3
    assert lstm.nbytes == 4 * (3 * head + 4 * (2 * later + first)) // 3
    assert untied.cost_key() == make_speculator(target={"name": "x"}).cost_key() != lstm.cost_key()


@pytest.mark.parametrize("name", CASES)
def test_folder(name: str, tmp_path: Path) -> None:
    speculator = make_speculator(target={"name": "toy"}, **CASES[name])
    save_drafter(speculator, tmp_path / "drafter")
    loaded = load_drafter(tmp_path / "drafter")
    assert isinstance(loaded, Speculator) and loaded.config == speculator.config and not loaded.training
    for key, array in named_weights(speculator).items():
        assert mx.array_equal(named_weights(loaded)[key], array).item(), key
    with pytest.raises(ValueError, match="is a mlp_speculator, and this takes a recurrent_drafting_drafter"):
        load_recurrent(tmp_path / "drafter")


def test_quantized_folder(tmp_path: Path) -> None:
    quantization = {"bits": 8, "group_size": 32}
    speculator = make_speculator(inner_size=64, quantization=quantization)
    want, _ = beams(speculator.recurrence(), random_context(0), 2, 1, 4)
    quantize(speculator, quantization)
    save_drafter(speculator, tmp_path / "drafter")
    loaded = load_drafter(tmp_path / "drafter")
    assert isinstance(loaded, Speculator) and "scales" in loaded.head[0]
    got, _ = beams(loaded.recurrence(), random_context(0), 2, 1, 4)
    assert got.tolist() == want.tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_predict": 0}, "n_predict must be a positive integer"),
        ({"n_predict": 64}, "n_predict must be at most 63, not 64"),
        ({"inner_size": "48"}, "inner_size must be an integer of at most 16777216, not '48'"),
        ({"method": "sum_gru"}, "method must be sum_rnn or sum_lstm, not 'sum_gru'"),
        ({"tie_weights": 1}, "tie_weights must be true or false, not 1"),
        ({"tie_weights": True, "n_predict": 1}, "there is nothing to tie with n_predict 1"),
        ({"method": "sum_lstm"}, "tie_weights must be true where method is sum_lstm"),
        ({"tie_lstm_embs": True}, "tie_lstm_embs must be false where method is sum_rnn"),
        ({"quantization": {"bits": 7, "group_size": 32}}, "quantization bits .*not 7"),
        ({"hidden_size": None}, "hidden_size must be an integer"),
    ],
)
def test_wrong_configs(changes: dict[str, Any], message: str) -> None:
    values = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "inner_size": 48, "n_predict": 3, **changes}
    with pytest.raises(ValueError, match=f"here.*{message}"):
        SpeculatorConfig.from_dict(values, "here")


def test_config_keys() -> None:
    values = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "inner_size": 48, "n_predict": 3}
    config, unknown = SpeculatorConfig.from_dict({**values, "color": 1}, "here")
    assert unknown == ["color"]
    assert SpeculatorConfig.from_dict(config.to_dict(), "here") == (config, [])
    del values["n_predict"]
    with pytest.raises(ValueError, match="here lacks n_predict"):
        SpeculatorConfig.from_dict(values, "here")
    with pytest.raises(ValueError, match="as it was published: `redrafter-convert drafter`"):
        SpeculatorConfig.from_dict({"emb_dim": 4096, "n_predict": 3, "vocab_size": 32000}, "here")

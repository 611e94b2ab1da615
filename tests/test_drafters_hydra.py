"""Hydra's heads, with and without a prefix layer: their formulas, and that decoding with them changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.heads import HYDRA, PREFIX, make_hydra, prefix_reference, published, reference
from tests.toy import HIDDEN, VOCAB, make_target

# isort: split
import mlx.core as mx
import numpy as np

import redrafter_mlx as rd
from redrafter_mlx.drafters.beam import beams
from redrafter_mlx.drafters.hydra import Hydra, HydraConfig
from redrafter_mlx.drafters.interface import Rows, Seen
from redrafter_mlx.drafters.kinds import load_drafter, save_drafter
from redrafter_mlx.drafters.recurrent import quantize
from redrafter_mlx.files import named_weights
from redrafter_mlx.generation import Model, generate
from redrafter_mlx.sampling import Sampling
from redrafter_mlx.tree import Beam

PROMPT = [5, 9, 33, 2, 17]
SIZES = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_heads": 3}
WITHOUT_PREFIX = [name for name in HYDRA if not name.startswith("prefix")]


def random_contexts(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, HIDDEN)).astype(np.float32) * 2


@pytest.mark.parametrize("family", ["llama", "gemma"])
@pytest.mark.parametrize("name", HYDRA)
def test_logits_are_those_of_the_formulas(name: str, family: str) -> None:
    """Along one text, and for two beams that change places. A gemma multiplies its embedding; these heads read it as
    it is stored.
    """
    target, drafter = make_target(family), make_hydra(**HYDRA[name])
    drafter.attach(target)
    context, config, tensors = random_contexts(1, 1)[0], drafter.config, published(drafter)
    stored = np.array(target.embedding.weight)

    def want(path: list[int]) -> np.ndarray:
        return reference(config, tensors, context, stored[path])

    state = drafter.begin(mx.array(context), mx.array(7))
    got = drafter.logits(state, 0)
    assert got.shape == (1, VOCAB) and got.dtype == mx.float32
    np.testing.assert_allclose(got[0], want([7]), atol=2e-3, rtol=1e-4)
    state = drafter.advance(state, mx.array([0, 0]), mx.array([40, 50]), 0)
    state = drafter.advance(state, mx.array([1, 0]), mx.array([3, 60]), 1)
    for row, path in enumerate(([7, 50, 3], [7, 40, 60])):
        found = drafter.logits(state, 2)
        np.testing.assert_allclose(found[row if config.grounded else 0], want(path), atol=2e-3, rtol=1e-4)


def greedy(drafter: Hydra, stored: np.ndarray, c: np.ndarray, root: int) -> list[int]:
    """The chain of most probable guesses after `root`, by the formulas."""
    path, tensors = [root], published(drafter)
    for _ in range(drafter.config.num_heads):
        path.append(int(reference(drafter.config, tensors, c, stored[path]).argmax()))
    return path


@pytest.mark.parametrize("name", WITHOUT_PREFIX)
def test_greedy_chain_through_beam_search(name: str) -> None:
    target, drafter = make_target(), make_hydra(**HYDRA[name])
    drafter.attach(target)
    stored = np.array(target.embedding.weight)
    for root, context in enumerate(random_contexts(2, 5)):
        chain, _ = beams(drafter.recurrence(), mx.array(context), root, 1, 4)
        assert chain.tolist() == [greedy(drafter, stored, context, root)]


@pytest.mark.parametrize("name", [name for name in HYDRA if name.startswith("prefix")])
def test_drafts_read_all_rows_that_were_shown(name: str) -> None:
    """A prompt, steps whose padded rows do not count, and a step back: the prefix is that of the rows that count."""
    target, drafter = make_target(), make_hydra(**HYDRA[name])
    drafter.attach(target)
    stored, tensors = np.array(target.embedding.weight), published(drafter)
    rows, tokens = random_contexts(3, 40), mx.zeros((40,), dtype=mx.int32)
    text: Any = drafter.start(PROMPT)

    def draft(length: int) -> list[int]:
        root = 7 + length
        seen = Seen(mx.array(rows[length - 1]), mx.array(root), None, mx.array(length, dtype=mx.int32))
        return [root, *np.array(text.draft(seen, Beam(1, 4)).tokens).tolist()]

    def want(length: int) -> list[int]:
        c = prefix_reference(drafter.config, tensors, rows[:length])[-1]
        return greedy(drafter, stored, c, 7 + length)

    def show(start: int, padded: int, count: int) -> None:
        shown = np.concatenate([rows[start : start + count], random_contexts(9, padded - count)])
        text.observe(Rows(mx.array(shown), tokens[:padded], start, mx.array(count, dtype=mx.int32)))

    text.observe(Rows(mx.array(rows[:6]), tokens[:6], 0))
    assert draft(6) == want(6) and text.shown == 6
    show(6, 4, 1)
    assert draft(7) == want(7)
    show(7, 4, 4)
    assert draft(11) == want(11)
    for position in (11, 12, 13):  # plain steps
        text.observe(Rows(mx.array(rows[position][None]), tokens[:1], position))
    show(14, 3, 2)
    assert draft(16) == want(16)
    text.observe(Rows(mx.array(rows[16:19]), tokens[:3], 16))
    text.trim(9)  # rows that were written, and those that no draft has asked for
    assert text.shown == 9
    text.observe(Rows(mx.array(rows[9:30]), tokens[:21], 9))
    assert draft(30) == want(30)
    with pytest.raises(ValueError, match="has been shown 30, and is given those from 32: there is a gap"):
        text.observe(Rows(mx.array(rows[32:33]), tokens[:1], 32))


def test_a_text_without_rows_is_refused() -> None:
    drafter = make_hydra(prefix=PREFIX)
    drafter.attach(make_target())
    seen = Seen(mx.zeros((HIDDEN,)), mx.array(1), None, mx.array(5, dtype=mx.int32))
    with pytest.raises(ValueError, match="has been shown none"):
        drafter.start(PROMPT).draft(seen, Beam(1, 3))


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "one_layer"),
        ("llama", "not_grounded"),
        ("llama", "prefix_four_layers"),
        ("gemma3", "prefix"),
    ],
)
def test_drafted_is_plain(family: str, name: str) -> None:
    target, drafter = make_target(family), make_hydra(**HYDRA[name])
    drafter.eval()
    drafter.attach(target)
    model, accepted = Model(target, drafter), 0
    for sampling in (Sampling(), Sampling(temperature=0.8, seed=3)):
        _, plain = generate(model, PROMPT, max_tokens=32, sampling=sampling, draft="off")
        assert len(set(plain.token_ids)) > 4, "a degenerate text would prove nothing"
        for draft in ("1x4", "3x4", "8x4@16", "16x3"):
            _, stats = generate(model, PROMPT, max_tokens=32, sampling=sampling, draft=draft)
            assert stats.token_ids == plain.token_ids, draft
            accepted += stats.accepted_tokens
    assert accepted > 0


def test_what_it_needs_and_what_it_can() -> None:
    target = make_target()
    plain, prefixed = make_hydra(), make_hydra(prefix=PREFIX)
    assert not plain.needs_rows and prefixed.needs_rows and not prefixed.needs_text
    assert plain.max_length == 4 and plain.max_width == VOCAB
    prefixed.attach(target)
    with pytest.raises(ValueError, match="beam length must be at most 4 with this drafter, not 5"):
        rd.stream_generate(Model(target, prefixed), PROMPT, draft="2x5")
    with pytest.raises(ValueError, match="must be attached to its target first"):
        beams(plain.recurrence(), mx.zeros((HIDDEN,)), 1, 2, 3)
    with pytest.raises(ValueError, match=r"hidden_size is 16 .*, the target has 32"):
        make_hydra(hidden_size=16).attach(target)


def test_cost_and_bytes() -> None:
    """A level reads one head, the mean of those that read 2, 3 and 4 vectors."""
    output, later = VOCAB * (HIDDEN + 1), HIDDEN * (HIDDEN + 1)
    first = 2 * HIDDEN * (3 * HIDDEN + 1)
    assert make_hydra(num_layers=4, num_blocks=2).nbytes == 4 * (first + 3 * later + output)
    assert make_hydra().cost_key() == make_hydra(target={"name": "x"}).cost_key()
    assert make_hydra().cost_key() != make_hydra(prefix=PREFIX).cost_key()


@pytest.mark.parametrize("name", HYDRA)
def test_folder(name: str, tmp_path: Path) -> None:
    drafter = make_hydra(target={"name": "toy"}, **HYDRA[name])
    save_drafter(drafter, tmp_path / "drafter")
    loaded = load_drafter(tmp_path / "drafter")
    assert isinstance(loaded, Hydra) and loaded.config == drafter.config and not loaded.training
    assert loaded.config.grounded == drafter.config.grounded
    for key, array in named_weights(drafter).items():
        assert mx.array_equal(named_weights(loaded)[key], array).item(), key


def test_quantized_folder(tmp_path: Path) -> None:
    quantization = {"bits": 8, "group_size": 32}
    drafter, target = make_hydra(quantization=quantization, prefix=PREFIX), make_target()
    drafter.attach(target)
    want, _ = beams(drafter.recurrence(), mx.ones((HIDDEN,)), 2, 1, 4)
    quantize(drafter, quantization)
    save_drafter(drafter, tmp_path / "drafter")
    loaded = load_drafter(tmp_path / "drafter")
    assert (
        isinstance(loaded, Hydra) and "scales" in loaded.heads[0].output and "scales" in loaded.prefix.q_proj
    )
    loaded.attach(target)
    got, _ = beams(loaded.recurrence(), mx.ones((HIDDEN,)), 2, 1, 4)
    assert got.tolist() == want.tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 64}, "num_heads must be at most 63, not 64"),
        ({"grounded": 1}, "grounded must be true or false, not 1"),
        ({"prefix": 3}, "prefix must be an object, not 3"),
        ({"prefix": {}}, "prefix lacks num_attention_heads, num_key_value_heads, head_dim, intermediate_size"),
        ({"prefix": {**PREFIX, "num_key_value_heads": 3}}, "num_attention_heads must be a multiple of num_key_value_h"),
        ({"prefix": {**PREFIX, "head_dim": 7}}, "head_dim must be even, not 7"),
        ({"prefix": {**PREFIX, "rope_theta": -1.0}}, "rope_theta must be above 0"),
        ({"prefix": {**PREFIX, "rms_norm_eps": "x"}}, "rms_norm_eps must be a number, not 'x'"),
        ({"prefix": {**PREFIX, "rms_norm_eps": -1.0}}, "rms_norm_eps must be 0 or more"),
        ({"prefix": {**PREFIX, "rope_scaling": {"type": "odd"}}}, "rope_scaling {'type': 'odd'} cannot be used"),
        ({"prefix": {**PREFIX, "rope_scaling": {"type": "linear"}}}, "rope_scaling {'type': 'linear'} cannot be used"),
    ],
)  # fmt: skip
def test_wrong_configs(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"here.*{message}"):
        HydraConfig.from_dict({**SIZES, **changes}, "here")


def test_config_keys(tmp_path: Path) -> None:
    config, unknown = HydraConfig.from_dict({**SIZES, "color": 1, "prefix": {**PREFIX, "shape": 2}}, "here")
    assert unknown == ["color", "prefix.shape"]
    for changes in HYDRA.values():
        full = HydraConfig(**SIZES, **changes)
        assert HydraConfig.from_dict(full.to_dict(), "here") == (full, [])
    assert config != full
    (tmp_path / "config.json").write_text('{"hydra_num_heads": 4, "hydra_num_layers": 4}')
    with pytest.raises(ValueError, match="is Hydra's as it was published: `redrafter-convert drafter`"):
        load_drafter(tmp_path)

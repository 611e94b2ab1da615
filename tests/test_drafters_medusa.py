"""Medusa's heads: their formulas, and that decoding with them changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.heads import IDS, MEDUSA, make_medusa, published, reference
from tests.toy import HIDDEN, VOCAB, make_target

# isort: split
import mlx.core as mx
import numpy as np

import redrafter_mlx as rd
from redrafter_mlx.drafters.beam import beams
from redrafter_mlx.drafters.kinds import load_drafter, load_recurrent, save_drafter
from redrafter_mlx.drafters.medusa import Medusa, MedusaConfig
from redrafter_mlx.drafters.recurrent import quantize
from redrafter_mlx.files import named_weights
from redrafter_mlx.generation import Model, generate
from redrafter_mlx.sampling import Sampling
from redrafter_mlx.target import Target

PROMPT = [5, 9, 33, 2, 17]
SIZES = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_heads": 3}


def random_context(seed: int) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(size=HIDDEN).astype(np.float32) * 3)


def logits_of(drafter: Medusa, target: Target, context: np.ndarray) -> np.ndarray:
    """(num_heads, V) by the formulas."""
    tensors = published(drafter)
    if drafter.config.output == "target":
        rows = np.array(target.output_rows())
        if drafter.config.draft_vocab_size is not None:
            rows = rows[IDS]
        layers = drafter.config.num_layers
        tensors |= {f"{head}.{layers}.weight": rows for head in range(drafter.config.num_heads)}
    found = [reference(drafter.config, tensors, context, np.zeros((head + 1, HIDDEN)))
             for head in range(drafter.config.num_heads)]  # fmt: skip
    return np.stack(found)


@pytest.mark.parametrize("name", [*MEDUSA, "reduced_targets_output"])
def test_logits_are_those_of_the_formulas(name: str) -> None:
    """At every level the same behind every beam: nothing of what was drafted is read."""
    target = make_target()
    changes = MEDUSA.get(name, {"draft_vocab_size": 20, "output": "target"})
    drafter, context = make_medusa(**changes), random_context(1)
    drafter.attach(target)
    want = logits_of(drafter, target, np.array(context))
    state = drafter.begin(context, mx.array(3))
    for level in range(3):
        got = drafter.logits(state, level)
        assert got.shape == (1, drafter.vocab) and got.dtype == mx.float32
        np.testing.assert_allclose(got[0], want[level], atol=1e-3, rtol=1e-4)
        state = drafter.advance(state, mx.array([1, 0]), mx.array([4, 9]), level)


@pytest.mark.parametrize("name", ["one_layer", "reduced"])
def test_beams_are_the_most_probable_combinations(name: str) -> None:
    """Of all V^2 pairs of guesses: the levels are independent, so a pair's probability is a product."""
    target = make_target()
    drafter, context = make_medusa(**MEDUSA[name]), random_context(3)
    drafter.attach(target)
    logits = logits_of(drafter, target, np.array(context)) / 20  # flat enough that beams branch
    for head in drafter.heads:
        head.output.weight = head.output.weight / 20
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    pairs = (logprobs[0][:, None] + logprobs[1]).reshape(-1)
    best = np.argsort(-pairs)[:8]
    ids = IDS if name == "reduced" else list(range(VOCAB))
    found, scores = beams(drafter.recurrence(), context, 4, 8, 3)
    want = [[4, ids[int(i) // drafter.vocab], ids[int(i) % drafter.vocab]] for i in best]
    assert found.tolist() == want and len({second for _, _, second in want}) > 1
    np.testing.assert_allclose(scores, pairs[best], atol=1e-4)


@pytest.mark.parametrize(
    ("family", "name"), [("llama", "one_layer"), ("llama", "targets_output"), ("gemma3", "reduced")]
)
def test_drafted_is_plain(family: str, name: str) -> None:
    target, drafter = make_target(family), make_medusa(**MEDUSA[name])
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


@pytest.mark.parametrize("output", ["own", "target"])
def test_layout_for_search_changes_no_beam(output: str) -> None:
    target, context = make_target(), random_context(4)
    drafter = make_medusa(output=output)
    drafter.attach(target)
    want, scores = beams(drafter.recurrence(), context, 1, 4, 4)
    drafter.eval()
    drafter.attach(target)
    got, others = beams(drafter.recurrence(), context, 1, 4, 4)
    assert got.tolist() == want.tolist()
    np.testing.assert_allclose(others, scores, atol=1e-4)


def test_no_beam_is_longer_than_its_heads() -> None:
    target, drafter = make_target(), make_medusa()
    drafter.attach(target)
    assert drafter.max_length == 4 and drafter.max_width == VOCAB and not drafter.needs_rows
    with pytest.raises(ValueError, match="beam length must be at most 4 with this drafter, not 5"):
        rd.stream_generate(Model(target, drafter), PROMPT, draft="2x5")


def test_another_target_is_refused() -> None:
    with pytest.raises(ValueError, match=r"vocab_size is 60 \(made for sixty\), the target has 64"):
        make_medusa(vocab_size=60, target={"name": "sixty"}).attach(make_target())
    with pytest.raises(ValueError, match=r"hidden_size is 16 .*, the target has 32"):
        make_medusa(hidden_size=16, output="target").attach(make_target())
    with pytest.raises(ValueError, match="must be attached to its target first"):
        beams(make_medusa(output="target").recurrence(), random_context(0), 1, 2, 3)


def test_cost_and_bytes() -> None:
    """A level reads one head, a block as often as it is applied; what it costs does not depend on the target's name."""
    block, output = HIDDEN * (HIDDEN + 1), VOCAB * HIDDEN
    assert make_medusa().nbytes == 4 * (block + output)
    assert make_medusa(**MEDUSA["one_block_three_times"]).nbytes == 4 * (3 * block + output)
    shared = make_medusa(output="target")
    shared.attach(make_target())
    assert shared.nbytes == 4 * (block + output)
    assert make_medusa().cost_key() == make_medusa(target={"name": "x"}).cost_key() != shared.cost_key()


@pytest.mark.parametrize("name", MEDUSA)
def test_folder(name: str, tmp_path: Path) -> None:
    drafter = make_medusa(target={"name": "toy"}, **MEDUSA[name])
    save_drafter(drafter, tmp_path / "drafter")
    loaded = load_drafter(tmp_path / "drafter")
    assert isinstance(loaded, Medusa) and loaded.config == drafter.config and not loaded.training
    for key, array in named_weights(drafter).items():
        assert mx.array_equal(named_weights(loaded)[key], array).item(), key
    with pytest.raises(ValueError, match="is a medusa_heads, and this takes a recurrent_drafting_drafter"):
        load_recurrent(tmp_path / "drafter")


def test_quantized_folder(tmp_path: Path) -> None:
    quantization = {"bits": 8, "group_size": 32}
    drafter = make_medusa(quantization=quantization)
    want, _ = beams(drafter.recurrence(), random_context(0), 2, 1, 4)
    quantize(drafter, quantization)
    save_drafter(drafter, tmp_path / "drafter")
    loaded = load_drafter(tmp_path / "drafter")
    assert isinstance(loaded, Medusa) and "scales" in loaded.heads[0].output
    got, _ = beams(loaded.recurrence(), random_context(0), 2, 1, 4)
    assert got.tolist() == want.tolist()


def test_missing_and_misshapen_tensors_are_one_error(tmp_path: Path) -> None:
    save_drafter(make_medusa(), tmp_path / "drafter")
    weights = mx.load(str(tmp_path / "drafter" / "model.safetensors"))
    assert isinstance(weights, dict)
    del weights["heads.1.output.weight"]
    weights["heads.2.blocks.0.linear.bias"] = mx.zeros((5,))
    mx.save_safetensors(str(tmp_path / "drafter" / "model.safetensors"), weights)
    with pytest.raises(
        ValueError, match=r"heads.1.output.weight \(64, 32\) is missing; heads.2.blocks.0.linear.b.* \(5,\)"
    ):
        load_drafter(tmp_path / "drafter")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 0}, "num_heads must be a positive integer"),
        ({"num_heads": 64}, "num_heads must be at most 63, not 64"),
        ({"num_layers": 1 << 20}, "num_layers must be at most 64, not 1048576"),
        ({"num_blocks": 2}, "num_blocks must be between 1 and num_layers 1, not 2"),
        ({"num_blocks": 0}, "num_blocks must be between 1 and num_layers 1, not 0"),
        ({"output": "both"}, "output must be own or target, not 'both'"),
        ({"draft_vocab_size": 65}, "draft_vocab_size must be between 1 and vocab_size 64, not 65"),
        ({"quantization": {"bits": 7, "group_size": 32}}, "quantization bits .*not 7"),
        ({"hidden_size": "32"}, "hidden_size must be an integer"),
        ({"vocab_size": 1 << 40}, "vocab_size must be an integer of at most 16777216"),
    ],
)
def test_wrong_configs(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"here.*{message}"):
        MedusaConfig.from_dict({**SIZES, **changes}, "here")


def test_config_keys(tmp_path: Path) -> None:
    config, unknown = MedusaConfig.from_dict({**SIZES, "color": 1}, "here")
    assert unknown == ["color"]
    for changes in MEDUSA.values():
        full = MedusaConfig(**SIZES, **changes)
        assert MedusaConfig.from_dict(full.to_dict(), "here") == (full, [])
    with pytest.raises(ValueError, match="here lacks num_heads"):
        MedusaConfig.from_dict({"vocab_size": VOCAB, "hidden_size": HIDDEN}, "here")
    (tmp_path / "config.json").write_text('{"medusa_num_heads": 2, "medusa_num_layers": 1}')
    with pytest.raises(ValueError, match="is Medusa's as it was published: `redrafter-convert drafter`"):
        load_drafter(tmp_path)

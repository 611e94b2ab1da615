"""What is checked when a model is loaded: whatever verifies wrongly is not drafted, near and far into a text."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.families import build
from tests.toy import FAMILIES, HIDDEN, VOCAB, make_target

# isort: split
import mlx.core as mx

from redrafter_mlx.auto import Learned
from redrafter_mlx.auto.timing import measure
from redrafter_mlx.generation import Model, generate, make_policy, stream_generate
from redrafter_mlx.measure.predict import wide_searches
from redrafter_mlx.policy import Off
from redrafter_mlx.target import Target
from redrafter_mlx.target.check import check_drafts
from redrafter_mlx.target.keys_values import KeysValues
from redrafter_mlx.target.positions import Positions
from redrafter_mlx.target.recurrent import Recorder
from redrafter_mlx.tree import Beam
from tests.toy import make_drafter


def loaded(family: str, max_length: int = 2048) -> Target:
    target = Target(build(family), family, max_length)
    target.check_tree()
    return target


@pytest.mark.parametrize("family", FAMILIES)
def test_families_that_verify_trees(family: str, caplog: pytest.LogCaptureFixture) -> None:
    target = make_target(family)
    target.check_tree()
    assert target.branches and target.drafts.chains and not target.drafts.reason
    assert not caplog.records


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("qwen3_5", "a recurrent state follows one path (3 of 4 layer states)"),
        ("llama4", "its attention in chunks follows one path (3 of 4 layer states)"),
    ],
)
def test_states_that_follow_one_path(family: str, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    target = loaded(family)
    assert not target.branches and target.drafts.chains and target.drafts.reason == reason
    assert not caplog.records, "it is as it should be"


def test_blocks_that_an_indexer_drops(caplog: pytest.LogCaptureFixture) -> None:
    """MiniMax M3's trees are right until blocks of the cache are dropped, far from the beginning."""
    target = loaded("minimax_m3_vl")
    assert not target.branches and target.drafts.chains
    assert "minimax_m3_vl verifies chains only: after 22 tokens the logits of a tree differ by" in caplog.text


def test_a_model_whose_chains_are_wrong(caplog: pytest.LogCaptureFixture) -> None:
    target = loaded("phi3small")
    assert not target.branches and not target.drafts.chains and target.depends_on_cut
    assert "phi3small is decoded plainly, without drafts: after 6 tokens the logits of a chain" in caplog.text
    assert len(caplog.records) == 1


def always_first(self: Positions, first: int, rows: int) -> None:
    """No row knows its depth."""


def siblings_seen(self: Any, N: int, window_size: int | None = None, return_array: bool = False) -> str:
    return "causal"


def one_more(self: KeysValues, asked: int | None, N: int) -> tuple[int | None, int]:
    """A window that is one position too wide where several rows are verified."""
    window = asked or self.window
    return (window if window is None or N == 1 else window + 1), 0


@pytest.mark.parametrize(
    ("family", "owner", "method", "fault", "still_chains"),
    [
        ("llama", Positions, "at", always_first, True),
        ("llama", KeysValues, "make_mask", siblings_seen, True),
        ("gemma3", KeysValues, "_window", one_more, False),
        ("mistral3", Positions, "_attention_scale", lambda self, theirs, *args: theirs(*args), True),
        ("qwen3_5", Recorder, "replay", lambda self, calls, rows, accepted: None, False),
        ("qwen3_5", Recorder, "_first", lambda self, value: value, False),
    ],
)
def test_faults_are_noticed(  # noqa: PLR0913  (a case has as many parts)
    family: str, owner: type, method: str, fault: Any, still_chains: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those that only show far into a text: a window, a scale by position."""
    assert loaded(family).drafts.chains
    monkeypatch.setattr(owner, method, fault)
    target = loaded(family)
    assert not target.branches and target.drafts.chains == still_chains


def test_a_tree_that_cannot_even_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(self: Any, tree: Any, cache: Any) -> Any:
        if not tree.is_chain:
            raise ValueError("mismatching batch dimension\nand a second line")
        return verify(self, tree, cache)

    verify = Target.verify
    monkeypatch.setattr(Target, "verify", failing)
    found = check_drafts(make_target("llama"))
    assert (found.branches, found.chains) == (False, True)
    assert found.reason == "a tree cannot be verified (mismatching batch dimension)"


def test_logits_that_are_no_numbers(caplog: pytest.LogCaptureFixture) -> None:
    target = make_target()
    target.model.lm_head.weight = mx.full((VOCAB, HIDDEN), float("nan"))
    target.check_tree()
    assert not target.drafts.chains and "differ by nan" in caplog.text


def test_the_check_leaves_texts_as_long_as_the_model_allows() -> None:
    """Lengths beyond it are not tried: positions there may be refused by the model."""
    target = Target(build("gpt2"), "gpt2", max_length=64)
    seen: list[int] = []
    target._positions.at = lambda first, rows: seen.append(first)  # type: ignore[method-assign]
    target.check_tree()
    assert max(seen, default=0) < 64


def model_of(target: Target) -> Model:
    return Model(target, make_drafter(target))


def test_what_is_asked_for_by_hand_is_refused_with_the_reason() -> None:
    model = model_of(loaded("qwen3_5"))
    with pytest.raises(
        ValueError, match=r"draft='3x4@8' is a tree, and qwen3_5 .* as 1x4: a recurrent state"
    ):
        make_policy(model, "3x4@8")
    assert make_policy(model, "1x4").shape() == Beam(1, 4)
    plain = model_of(loaded("phi3small"))
    with pytest.raises(ValueError, match="draft='1x4': phi3small verifies no drafts: after 6 tokens"):
        make_policy(plain, "1x4")
    assert isinstance(make_policy(plain, "auto"), Off)


def test_auto_drafts_chains_only() -> None:
    """Also while it measures, for no tree is ever verified."""
    model = model_of(loaded("qwen3_5"))
    model.learned = Learned(measure(model.target, model.drafter, budget=0.01))
    policy = make_policy(model, "auto")
    assert policy.wide.width == 1 and {width for width, _ in policy.shapes} == {1}  # type: ignore[attr-defined]
    plain, drafted = (
        generate(model, [5, 9, 33], max_tokens=24, draft=draft)[1].token_ids for draft in ("off", "auto")
    )
    assert plain == drafted


def test_windows_are_crossed_by_the_checked_rows(caplog: pytest.LogCaptureFixture) -> None:
    model = model_of(loaded("gemma3"))
    texts = [
        [chunk.token for chunk in stream_generate(model, list(range(1, 30)), max_tokens=20, draft=draft)]
        for draft in ("off", "3x4@8")
    ]
    assert texts[0] == texts[1] and not caplog.records


def test_tune_searches_chains_only() -> None:
    sample = wide_searches(model_of(loaded("qwen3_5")), [[5, 9, 33]], 12)
    assert {logprobs.shape[1] for logprobs in sample.logprobs} == {1}

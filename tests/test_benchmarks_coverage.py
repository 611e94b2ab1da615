"""A sample of the coverage benchmark, and that it notices what is wrong."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import coverage
from benchmarks.families import names
from benchmarks.ties import TIE, first_difference, gap
from tests.toy import VOCAB, make_model

# isort: split
import mlx.core as mx
import mlx_lm

from redrafter_mlx.sampling import Sampling
from redrafter_mlx.target import Target
from redrafter_mlx.target.cache import KVCache
from redrafter_mlx.target.recurrent import Recorder

SAMPLE = {
    "gemma3": "tree", "ministral3": "tree", "deepseek_v32": "tree", "plamo3": "tree", "qwen3_next": "chain",
    "lfm2": "chain", "falcon_h1": "chain", "llama4": "chain", "minimax_m3_vl": "chain", "phi3small": "",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage, "TOKENS", 16)
    monkeypatch.setattr(coverage, "TREES", ("3x4@8",))
    monkeypatch.setattr(coverage, "CHAINS", ("1x4",))


@pytest.mark.parametrize("family", SAMPLE)
def test_a_family_is_exact(family: str) -> None:
    found = coverage.examine(family, texts=(40,))
    assert found.exact == SAMPLE[family] and not found.wrong and found.is_sound
    assert found.accepted > 20 or not found.exact
    assert found.scattered > 0 or found.exact != "tree"
    assert bool(found.reason) == (found.exact != "tree")
    assert found.reused > 0 or family in ("plamo3", "phi3small"), "whose caches cannot be taken up again"


@pytest.mark.parametrize(("family", "reason"), [("deepseek_v41", "keeps a LayerCache"), ("olmo", "ai2-olmo")])
def test_a_family_is_refused(family: str, reason: str) -> None:
    found = coverage.examine(family)
    assert not found.exact and reason in found.reason and not found.texts


@pytest.mark.parametrize(
    ("family", "owner", "method"), [("llama", KVCache, "keep"), ("lfm2", Recorder, "replay")]
)
def test_faults_are_wrong_texts(
    family: str, owner: type, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a check at load that sees nothing."""
    monkeypatch.setattr(Target, "check_tree", lambda self: None)

    def keep(self: KVCache, path: Any) -> None:
        self.commit(len(path))

    monkeypatch.setattr(owner, method, keep if method == "keep" else lambda self, calls, rows, accepted: None)
    found = coverage.examine(family, texts=(40,))
    assert found.wrong and not found.is_sound and "differs at token" in found.wrong[0]


def test_every_module_is_looked_at() -> None:
    listed = names()
    assert {"llama", "solar_open", "qwen3_5_moe", "lille-130m", "nemotron-nas"} <= set(listed)
    assert not {"cache", "base", "rope_utils", "ssm", "mla", "pipeline"} & set(listed)
    assert len(listed) >= 126 or mlx_lm.__version__ < "0.32.2"


def test_the_summary_and_the_table() -> None:
    results = [
        coverage.Coverage("a", "tree", layers="3 windows", texts=5, accepted=7),
        coverage.Coverage("b", "chain", "a recurrent state", "2 recurrent", ["differs"], accepted=1),
        coverage.Coverage("c", reason="no package"),
    ]
    counts = coverage.summary(results)
    assert [counts[name] for name in ("families", "tree", "chain", "refused", "wrong")] == [3, 1, 1, 1, 1]
    assert coverage.table(results).splitlines()[2:] == [
        "| a | 3 windows | trees |  |", "| b | 2 recurrent | chains | a recurrent state |",
        "| c |  | none | no package |",
    ]  # fmt: skip


def test_texts_that_part_at_a_tie() -> None:
    """Greedy: of two tokens with equal scores, and of two with clearly different ones."""
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 5, 3]) == 1 and first_difference([1, 2], [1, 2, 3]) == 2
    model = make_model()
    assert gap(model, [1, 2, 3], Sampling(), VOCAB) > TIE
    model.lm_head.weight = mx.concatenate([model.lm_head.weight[: VOCAB // 2]] * 2)
    assert gap(model, [1, 2, 3], Sampling(), VOCAB) < TIE

"""Verification: a drafter made for a target passes, one that nothing is accepted of is an error and is not written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import redrafter_mlx  # noqa: F401  (before mlx)

# isort: split
import mlx.core as mx
import numpy as np

from convert.__main__ import main
from convert.verify import Verified
from redrafter_mlx.auto import timing
from redrafter_mlx.drafters.kinds import save_drafter
from redrafter_mlx.drafters.recurrent import DrafterConfig, RecurrentDrafter
from redrafter_mlx.stats import Stats
from tests.toy import HIDDEN, save_folder


def codes(vocab: int) -> np.ndarray:
    """A code of +1 and -1 for every token, no two alike."""
    found = np.random.default_rng(0).choice([-1.0, 1.0], (vocab, HIDDEN)).astype(np.float32)
    assert len(np.unique(found, axis=0)) == vocab
    return found


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny target without a drafter, whose next token is always the last one's successor.

    Its layers add nothing, its embedding is a code and its head knows the codes. What is measured is kept apart.
    """
    monkeypatch.setenv("REDRAFTER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(timing, "BUDGET_SECONDS", 0.1)
    folder = save_folder(tmp_path / "target")
    shutil.rmtree(folder / "drafter")
    arrays = mx.load(str(folder / "model.safetensors"))
    assert isinstance(arrays, dict)
    for name in arrays:
        if "o_proj" in name or "down_proj" in name:
            arrays[name] = mx.zeros_like(arrays[name])
    code = codes(len(arrays["lm_head.weight"]))
    arrays["model.embed_tokens.weight"] = mx.array(10 * code)
    arrays["lm_head.weight"] = mx.array(np.roll(code, 1, axis=0))
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)
    return folder


def exported(target: Path, to: Path, sign: float = 1.0) -> Path:
    """A drafter of Apple's format that is always right, or, with sign -1, drafts the least likely tokens.

    Its state is SiLU of the token's embedding, which keeps the +10 of a code, drops the -10, and still tells the token.
    """
    vocab = json.loads((target / "config.json").read_text())["vocab_size"]
    drafter = RecurrentDrafter(DrafterConfig(vocab, HIDDEN, 2 * HIDDEN, 0))
    head = np.concatenate([np.zeros((vocab, HIDDEN), np.float32), np.roll(codes(vocab), 1, axis=0)], axis=1)
    zeros = mx.zeros((HIDDEN, HIDDEN))
    weights = {"rnn_u.weight": zeros, "rnn_u.bias": zeros[0], "rnn_w.weight": mx.eye(HIDDEN)}
    drafter.load_weights(list({**weights, "lm_head.0.weight": mx.array(sign * head)}.items()))
    save_drafter(drafter, to / "ours")
    assert main(["export", str(to / "ours"), "--out", str(to / "apple"), "--target", str(target)]) == 0
    return to / "apple"


def lines_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, str]:
    capsys.readouterr()
    assert main(list(arguments)) == 0
    return dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())


def test_a_drafter_for_the_target(target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = exported(target, tmp_path), tmp_path / "out"
    capsys.readouterr()
    assert main(["drafter", str(source), "--out", str(out), "--verify", str(target)]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{out}\n" and "tokens per step: " in captured.err
    config = json.loads((out / "config.json").read_text())
    assert config["target"]["name"] == "target"  # --verify says what --target would
    for drafter in (source, out):
        found = lines_of(capsys, "verify", str(drafter), "--target", str(target))
        assert found["verified with"] == "target" and found["decoded"].endswith("for 4 prompts, draft 4x4")
        assert float(found["tokens per step"].split()[0]) > 3 and "warning" not in found


def test_a_drafter_that_nothing_is_accepted_of(
    target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = exported(target, tmp_path, sign=-1.0)
    capsys.readouterr()
    before = sorted(tmp_path.iterdir())
    for given in (
        ["drafter", str(source), "--out", str(tmp_path / "out"), "--verify", str(target)],
        ["verify", str(source), "--target", str(target)],
    ):
        assert main(given) == 2
        captured = capsys.readouterr()
        last = captured.err.strip().splitlines()[-1]
        assert captured.out == "" and last.startswith("error: target accepts none of the ")
        assert f"that {source} drafts" in last and "made for another model" in last
    assert sorted(tmp_path.iterdir()) == before


def test_without_a_tokenizer_the_prompts_are_random_tokens(
    target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = exported(target, tmp_path)
    for file in target.glob("*token*"):
        file.unlink()
    found = lines_of(capsys, "verify", str(source), "--target", str(target))
    assert float(found["tokens per step"].split()[0]) > 3


def test_a_target_that_says_nothing_verifies_nothing(
    target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = exported(target, tmp_path)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(
        json.dumps({**config, "eos_token_id": list(range(config["vocab_size"]))})
    )
    assert main(["verify", str(source), "--target", str(target)]) == 2
    assert "ends every answer at once" in capsys.readouterr().err


def test_verify_and_target_are_one_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["drafter", "x", "--out", str(tmp_path / "out"), "--verify", "a/b", "--target", "c/d"]
    assert main(given) == 2
    assert "--verify a/b and --target c/d must name the same model" in capsys.readouterr().err


def test_info_measures_what_drafting_costs(
    target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = exported(target, tmp_path)
    for drafter in (source, tmp_path / "ours"):
        found = lines_of(capsys, "info", str(drafter), "--target", str(target))
        assert found["fits"].startswith("targets of hidden size 32 and vocabulary 260")
        assert found["a drafted level reads"] == "0.07 MB"
        assert found[f"fits {target}"] == "yes"
        assert found["a plain step"].split(" ms, reads ")[1] == "0.13 MB"
        assert float(found["a plain step"].split()[0]) > 0 and "in 3 levels" in found["a draft 4x4"]


def test_info_says_why_a_drafter_does_not_fit(
    target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    apple = Path(__file__).parent / "goldens" / "dialects" / "model_pt"
    found = lines_of(capsys, "info", str(apple), "--target", str(target))
    reason = found[f"fits {target}"]
    assert reason.startswith("no: ") and "hidden_size is 16" in reason and "32" in reason
    assert main(["info", str(target), "--target", str(target)]) == 2
    assert "--target" in (err := capsys.readouterr().err) and "is for drafters" in err
    assert main(["info", str(apple), "--target", str(tmp_path / "absent")]) == 2
    assert "no target at" in capsys.readouterr().err


def test_a_little_accepted_is_a_warning() -> None:
    stats = Stats(
        steps=200, decoded_tokens=204, drafted_tokens=2400, accepted_tokens=4, accepted_by_depth=[4]
    )
    assert "by chance" in Verified("target", "4x4", 4, stats).lines()["warning"]
    stats.accepted_by_depth = [20]
    assert "warning" not in Verified("target", "4x4", 4, stats).lines()

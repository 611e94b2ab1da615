"""`redrafter train` from its options to a finished folder, on a tiny model folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from apps.cli import main

from .training import arguments, tiny_target, without

# isort: split
import mlx.core as mx

pytestmark = pytest.mark.slow


ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_target(tmp_path_factory.mktemp("target"), "llama")


def run_until(command: list[str], reached: Callable[[], bool]) -> None:
    """Start the command and kill it, as a crash would, once `reached`."""
    quiet = subprocess.DEVNULL
    process = subprocess.Popen([sys.executable, "-m", "apps", *command], cwd=ROOT, stdout=quiet, stderr=quiet)
    while not reached():
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def weights(folder: Path) -> dict[str, np.ndarray]:
    arrays = mx.load(str(folder / "model.safetensors"))
    assert isinstance(arrays, dict)
    return {name: np.array(array) for name, array in arrays.items()}


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_killed_twice_it_ends_as_if_never_killed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once while it writes text, once while it trains."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(arguments(folder, whole)) == 0
    assert "tokens per step on held-out text" in capsys.readouterr().out
    shards = sorted(path.name for path in (whole / "data").glob("shard-*.npz"))
    assert len(shards) == 4
    command = arguments(folder, cut)
    run_until(command, (cut / "data" / shards[0]).exists)
    assert not (cut / "last.safetensors").exists()
    run_until(command, (cut / "last.safetensors").exists)
    assert not (cut / "float16").exists()
    assert main(command) == 0
    for shard in shards:
        with np.load(whole / "data" / shard) as mine, np.load(cut / "data" / shard) as theirs:
            assert all(np.array_equal(mine[key], theirs[key]) for key in mine.files)
    mine, theirs = weights(whole), weights(cut)
    for name in mine:
        # MKL rounds by memory alignment, see test_train.py
        np.testing.assert_allclose(mine[name], theirs[name], atol=1e-4, rtol=1e-3, err_msg=name)
    assert (whole / "metrics.jsonl").read_text().count("\n") > 2


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--length", "1"], "--length counts the root and must be between 2 and 64, not 1"),
        (["--self-prompt", "0"], "the number of answers must be at least 1, not 0"),
        (["--prompts", "missing.jsonl"], "prompts: no file missing.jsonl"),
        (["--context-layers", "a"], "--context-layers must be auto, none or numbers"),
        (["--context-layers", "7"], "context_layers must lie in 0..2"),
        (["--context-layers", "1,1"], "context_layers must be different and 0 or more"),
        (["--quantize", "3"], "--quantize must be 4 or 8 bits, or 0 for none, not 3"),
        (["--draft-vocab", "-1"], "--draft-vocab must be 0 (all) or more, not -1"),
        (["--epochs", "inf"], "epochs must be positive and finite, not inf"),
        (["--start-from", "nowhere"], "--start-from: no drafter at nowhere"),
        (["--push-to-hub", "a/b/c"], "--push-to-hub must be owner/name"),
        (["--push-to-hub", "me/drafter"], "--push-to-hub me/drafter needs a login"),
        (
            ["--self-prompt", "2", "--max-tokens", "8"],
            "there is too little text to train on: 2 answers",
        ),
        (["--loss", "mse"], "--loss must be one of kl, tv, lk, gumbel, not 'mse'"),
        (["--depth-weights", "flat"], "--depth-weights must be one of decay, dpace, not 'flat'"),
        (["--loss", "tv", "--soft", "0.5"], "soft 0.5 is for the loss kl; tv has its own mixture"),
        (["--text", "text.npz"], "--max-tokens is for answers to be written, and text.npz has them"),
        (["--minutes", "5"], "give a number of answers (--self-prompt) or a time (--minutes), not both"),
        (
            ["--max-tokens", "500"],
            "--max-tokens must leave room for a question of 80 tokens in the 512 tokens",
        ),
        (["--exit-dim", "1000000000"], "exit_dim must be between 1 and 65536, not 1000000000"),
        (["--layers", "1000000"], "the number of residual blocks must be between 0 and 64, not 1000000"),
        (["--length", "65"], "--length counts the root and must be between 2 and 64, not 65"),
        (["--seed", "-1"], "the seed must be between 0 and 2^64 - 1, not -1"),
        (["--seed", str(1 << 64)], "the seed must be between 0 and 2^64 - 1, not 18446744073709551616"),
        (["--soft", "2"], "soft must be between 0 and 1, not 2.0"),
        (["--batch", "100"], "--batch must be a multiple of 32, not 100"),
        (["--start-from", "d", "--exit-dim", "64"], "--start-from keeps that drafter's shape"),
        (["--start-from", "d", "--layers", "2"], "--start-from keeps that drafter's shape"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    extra: list[str],
    message: str,
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    out = tmp_path / "deep" / "out"
    assert main([*arguments(folder, out), *extra]) == 2
    error = capsys.readouterr().err
    assert f"error: {message}" in error.replace("\n", " ") and "Traceback" not in error
    assert not out.parent.exists()


def test_text_of_an_earlier_run_gives_the_same_states(folder: Path, tmp_path: Path) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    assert main([*arguments(folder, first), "--epochs", "1"]) == 0
    command = [*without(arguments(folder, again), "--max-tokens"), "--epochs", "1"]
    assert main([*command, "--text", str(first / "text.npz")]) == 0
    assert not (again / "text.npz").exists()
    shards = sorted((first / "data").glob("shard-*.npz"))
    assert len(shards) == 4
    for shard in shards:
        with np.load(shard) as mine, np.load(again / "data" / shard.name) as theirs:
            assert all(
                np.allclose(mine[key], theirs[key], atol=1e-3) for key in ("tokens", "starts", "temperatures")
            )
            assert mine["prompts"].tolist() == theirs["prompts"].tolist()
        name = shard.with_suffix(".contexts.npy").name
        mine_contexts, theirs_contexts = np.load(first / "data" / name), np.load(again / "data" / name)
        # rounded to float16 after sums of another order
        np.testing.assert_allclose(mine_contexts.astype(float), theirs_contexts.astype(float), atol=5e-3)


def test_text_that_is_none(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "text.npz"
    broken.write_bytes(b"PK")
    for file, message in ((broken, "does not hold answers"), (tmp_path / "no.npz", "no file")):
        command = without(arguments(folder, tmp_path / "out"), "--max-tokens")
        assert main([*command, "--text", str(file)]) == 2
        assert message in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize("family", ["qwen3", "gemma"])
def test_other_targets_from_start_to_figures(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Text, training, export and use, through the commands; the drafter helps and changes nothing."""
    target, out = tiny_target(tmp_path / "target", family), tmp_path / "out"
    # hard targets: the distributions of random weights are nearly flat
    assert main([*arguments(target, out), "--soft", "0", "--learning-rate", "0.005"]) == 0
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["loss"] < records[1]["loss"] - 0.1, "random weights write text that is hard to guess"
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "".join(json.dumps({"prompt": f"w{i} w{i + 7} w{3 * i}"}) + "\n" for i in range(5, 17))
    )
    found = {}
    capsys.readouterr()
    for draft in ("off", "4x3@8"):
        command = [
            "generate",
            "--model",
            str(target),
            "--drafter",
            str(out / "float16"),
            "--json",
            "--draft",
            draft,
        ]
        assert main([*command, "--prompts", str(prompts), "--max-tokens", "32"]) == 0
        found[draft] = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["token_ids"] for r in found["off"]] == [r["token_ids"] for r in found["4x3@8"]]
    assert sum(r["stats"]["accepted_tokens"] for r in found["4x3@8"]) > 5


FULL_DISK = """
import resource, signal, sys
from apps.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
import redrafter_mlx.train.data, redrafter_mlx.train.trainer
if sys.argv[1] == "training":
    original = redrafter_mlx.train.trainer.Trainer.run
    def run(self, *args):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
        return original(self, *args)
    redrafter_mlx.train.trainer.Trainer.run = run
else:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
@pytest.mark.parametrize("when", ["writing", "training"])
def test_a_full_disk_is_one_error_and_leaves_nothing_half_written(
    folder: Path, tmp_path: Path, when: str
) -> None:
    """Files may grow to 20 kB only; a later run with room goes on where it was."""
    out = tmp_path / "out"
    command = [sys.executable, "-c", FULL_DISK, when, *arguments(folder, out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert not list(out.rglob("*.part*")) and not (out / "last.safetensors").exists()
    shards = list((out / "data").glob("shard-*.npz"))
    assert len(shards) == (4 if when == "training" else 0)
    assert not list((out / "data").glob("*.contexts.npy")) or when == "training"
    if when == "training":
        assert main(arguments(folder, out)) == 0


def test_the_drafter_goes_to_the_hub(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub

    calls: list[tuple[str, object]] = []
    cards: list[str] = []

    class Api:
        def create_repo(self, name: str, exist_ok: bool) -> None:
            calls.append((name, exist_ok))

        def upload_folder(self, repo_id: str, folder_path: Path) -> SimpleNamespace:
            calls.append((repo_id, sorted(path.name for path in folder_path.iterdir())))
            cards.append((folder_path / "README.md").read_text())
            return SimpleNamespace(oid="0123456789" * 4)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_token")
    command = [*arguments(folder, tmp_path / "out"), "--epochs", "1", "--push-to-hub", "me/drafter"]
    assert main(command) == 0
    assert calls == [("me/drafter", True), ("me/drafter", ["README.md", "config.json", "model.safetensors"])]
    out = capsys.readouterr().out
    assert "huggingface.co/me/drafter" in out
    assert f'"{folder.name}": {{"repo": "me/drafter", "revision": "{"0123456789" * 4}"}}' in out
    assert cards[0].startswith("---\nlibrary_name: mlx\n") and "--drafter me/drafter" in cards[0]


def test_a_target_without_a_chat_template(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    for file in folder.iterdir():
        (plain / file.name).write_bytes(file.read_bytes())
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "w2"}
    (plain / "tokenizer_config.json").write_text(json.dumps(settings))
    assert main(arguments(plain, tmp_path / "out")) == 2
    assert "error: the target has no chat template" in capsys.readouterr().err

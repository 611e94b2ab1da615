"""`redrafter train` from its options to a finished folder, on a tiny model folder."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from apps.cli import main

from .toy import _COMMON, FAMILIES, VOCAB, make_model

# isort: split
import mlx.core as mx
from mlx.utils import tree_flatten
from tokenizers import Tokenizer, models, pre_tokenizers

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
TEMPLATE = (
    "{% for m in messages %}w1 {{ m.content }} w2 {% endfor %}{% if add_generation_prompt %}w1 {% endif %}"
)


def tiny_target(path: Path, family: str) -> Path:
    """A random model of 64 words as a folder, with a chat template; w2 ends a turn."""
    path.mkdir(exist_ok=True)
    model = make_model(family)
    mx.save_safetensors(str(path / "model.safetensors"), dict(tree_flatten(model.parameters())))
    config = {**_COMMON, **FAMILIES[family], "eos_token_id": 2}
    (path / "config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "w2", "chat_template": TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_target(tmp_path_factory.mktemp("target"), "llama")


def arguments(folder: Path, out: Path) -> list[str]:
    options = "--self-prompt 48 --rows 12 --max-tokens 24 --epochs 40 --validate-every 10 --draft-vocab 40"
    return ["train", "--model", str(folder), "--out", str(out), *options.split()]


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
        (["--length", "1"], "--length counts the root and must be at least 2, not 1"),
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
    assert main([*arguments(folder, again), "--epochs", "1", "--text", str(first / "text.npz")]) == 0
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
        assert main([*arguments(folder, tmp_path / "out"), "--text", str(file)]) == 2
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

    class Api:
        def create_repo(self, name: str, exist_ok: bool) -> None:
            calls.append((name, exist_ok))

        def upload_folder(self, repo_id: str, folder_path: Path) -> None:
            calls.append((repo_id, sorted(path.name for path in folder_path.iterdir())))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_token")
    command = [*arguments(folder, tmp_path / "out"), "--epochs", "1", "--push-to-hub", "me/drafter"]
    assert main(command) == 0
    assert calls == [("me/drafter", True), ("me/drafter", ["README.md", "config.json", "model.safetensors"])]
    assert "huggingface.co/me/drafter" in capsys.readouterr().out


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


def test_the_second_training_in_a_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "apps", *arguments(folder, out)]
    code = f"""
import sys, time
from pathlib import Path
from redrafter_mlx.train.lock import locked_folder
with locked_folder(Path({str(out)!r})):
    print("locked", flush=True)
    sys.stdin.read()
"""
    pipe = subprocess.PIPE
    owner = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=pipe, stdout=pipe, text=True)
    assert owner.stdin is not None and owner.stdout is not None
    assert owner.stdout.readline() == "locked\n"
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 2
    assert f"error: another training (process {owner.pid}) is running in {out}" in refused.stderr
    assert sorted(path.name for path in out.iterdir()) == [".lock"]
    owner.stdin.close()
    owner.wait()
    assert not out.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGINT")
def test_interrupted_it_says_what_is_kept_and_goes_on(folder: Path, tmp_path: Path) -> None:
    """Ctrl-C within the first shard, in a log as in a terminal: nothing that was written is lost."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "apps", *arguments(folder, out), "--max-tokens", "400", "--epochs", "1"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("writing"):
            break
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait() == 130
    process.stderr.close()
    assert process.stdout is not None
    process.stdout.close()
    assert "Traceback" not in rest
    assert f"kept in {out}: " in rest and "The same command goes on" in rest
    assert list((out / "data").glob("begun-*.npz")) and not (out / ".lock").exists()


def test_what_it_says_before_and_after(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """How long, what to expect, that so little does not pay; then speed-up and a command that runs as written."""
    out = tmp_path / "my drafter"
    assert main([*arguments(folder, out), "--epochs", "1", "--quantize", "8"]) == 0
    said = capsys.readouterr()
    before = " ".join(said.err.split())
    assert "Here, now: writing about 864 tokens takes under a minute, training" in before
    assert "tokens per step with one beam of 5, by the curve measured" in before
    assert "warning: this run is too small to pay: about 864 tokens" in before
    assert "writing 0%: questions 0/15" in before and "training 100%" in before
    assert "x plain decoding" in said.out and "the same tokens" in said.out
    for name in ("float16", "8bit"):
        card = (out / name / "README.md").read_text()
        line = card.split("```sh\n")[1].splitlines()[0]
        assert (f"Use it: {line}\n" in said.out) == (name == "float16")
        assert main([*shlex.split(line)[1:], "--max-tokens", "4"]) == 0
        assert capsys.readouterr().out.strip()


def test_minutes_instead_of_a_number_of_answers(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A quarter of a minute less what follows leaves little to write; the same command then finds all done."""
    out = tmp_path / "out"
    command = [option for option in arguments(folder, out) if option not in ("--self-prompt", "48")]
    command += ["--epochs", "1", "--minutes", "0.25", "--validate-every", "1000"]
    assert main(command) == 0
    shards = {path.name: path.read_bytes() for path in (out / "data").glob("shard-*.npz")}
    assert shards and (out / "data" / "clock.json").is_file()
    assert main(command) == 0
    assert "holds a training that has begun: going on" in capsys.readouterr().err.replace("\n", " ")
    assert {path.name: path.read_bytes() for path in (out / "data").glob("shard-*.npz")} == shards

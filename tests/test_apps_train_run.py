"""What `redrafter train` says, before, meanwhile and after, and what it keeps."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from apps.cli import main
from redrafter_mlx.train.plan import Deadline, saved_text

from .training import arguments, tiny_target, without

# isort: split

pytestmark = pytest.mark.slow


ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_target(tmp_path_factory.mktemp("target"), "llama")


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
    """Ctrl-C while it writes, in a log as in a terminal: nothing that was written is lost."""
    out = tmp_path / "out"
    options = [*without(arguments(folder, out), "--self-prompt"), "--self-prompt", "100000"]  # hours
    command = [sys.executable, "-m", "apps", *options]
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
    assert "left, questions 0/15" in before and "training 100%" in before
    assert "x plain decoding" in said.out and "the same tokens" in said.out
    for name in ("float16", "8bit"):
        card = (out / name / "README.md").read_text()
        line = card.split("```sh\n")[1].splitlines()[0]
        assert (f"Use it: {line}\n" in said.out) == (name == "float16")
        assert main([*shlex.split(line)[1:], "--max-tokens", "4"]) == 0
        assert capsys.readouterr().out.strip()


def test_minutes_instead_of_a_number_of_answers(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Time, which here passes with the tokens, ends the writing; the same command then finds all done."""
    monkeypatch.setattr(Deadline, "left", lambda self, tally: 500 - tally.positions)
    out = tmp_path / "out"
    command = without(arguments(folder, out), "--self-prompt")
    command += ["--epochs", "1", "--minutes", "60", "--validate-every", "1000"]
    assert main(command) == 0
    shards = {path.name: path.read_bytes() for path in (out / "data").glob("shard-*.npz")}
    assert 500 <= saved_text(out / "data")[1] < 500 + 12, "the step that ends it has at most a token a row"
    assert (out / "data" / "clock.json").is_file()
    assert main(command) == 0
    assert "holds a training that has begun: going on" in capsys.readouterr().err.replace("\n", " ")
    assert {path.name: path.read_bytes() for path in (out / "data").glob("shard-*.npz")} == shards
    monkeypatch.setattr(Deadline, "left", lambda self, tally: 0)
    assert main([*command, "--out", str(tmp_path / "none")]) == 2
    assert "no text was written: 60.0 minutes leave no time for it" in capsys.readouterr().err

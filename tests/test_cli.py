"""The command line: help without mlx, mistakes as one line and exit code 2."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from apps.cli import main

ROOT = Path(__file__).parent.parent


def test_help_lists_the_commands_and_does_not_load_mlx() -> None:
    code = (
        "import sys; from apps.cli import main; rc = main(['--help']); "
        "heavy = {'mlx.core', 'mlx_lm', 'numpy', 'transformers'} & set(sys.modules); "
        "sys.exit(f'loaded {heavy}' if heavy else rc)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in ("chat", "generate", "demo", "train"):
        assert f"  {command} " in done.stdout


@pytest.mark.parametrize("command", ["chat", "generate", "demo"])
def test_every_command_with_a_model_takes_the_shared_options(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    for option in ("--model", "--drafter", "--draft", "--max-tokens"):
        assert option in shown


def test_without_arguments_shows_the_help(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["redrafter"])
    assert main() == 0
    assert "Usage: redrafter" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from redrafter_mlx import __version__

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"redrafter {__version__}\n"


def test_the_version_is_the_package_s() -> None:
    from redrafter_mlx import __version__

    assert f'version = "{__version__}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--bogus"], "--bogus"),
        (["bogus"], "bogus"),
        (["generate", "--bogus", "x"], "--bogus"),
        (["generate", "--max-tokens", "many", "x"], "--max-tokens"),
        (["generate", "--max-tokens", "0", "x"], "--max-tokens must be 1 or more, not 0"),
        (["generate", "--draft", "3by4", "x"], "'3by4'"),
        (["generate", "--temperature", "-1", "x"], "temperature must be a number, 0 or more, not -1.0"),
        (["generate", "--top-p", "1.5", "x"], "top_p"),
        (["generate", "--prompts", "/no/such/file"], "/no/such/file"),
        (["generate", "- a list"], "goes behind --"),
        (["generate", "caf\udce9"], "the prompt must be UTF-8"),
        (["generate", "--stop", "\ud800", "x"], "--stop must be UTF-8"),
        (["generate", "--system", "\udcff", "x"], "--system must be UTF-8"),
        (["chat", "--system", "\udcff"], "--system must be UTF-8"),
        (["demo", " "], "the prompt is empty"),
        (["generate", "--prompts", "a.jsonl", "x"], "not both"),
        (["generate", "--raw", "--system", "s", "x"], "--raw"),
        (["generate", "--model", "/no/such/model", "x"], "/no/such/model"),
        (["generate", " "], "the prompt is empty"),
        (["demo", "--draft", "off"], "--draft off"),
        (["chat", "--draft", "4"], "'4'"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(
    argv: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and named in err and err.count("\n") == 1
    assert out == ""

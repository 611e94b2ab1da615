"""Input that ended in a traceback."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import redrafter_mlx as rd

# isort: split
import mlx.core as mx
import numpy as np

from redrafter_mlx.auto import cost_table
from tests.cases.command import ROOT, generate, redrafter, refused, works_or_refused
from tests.cases.models import BROKEN_TEMPLATE, STRICT_TEMPLATE, edit_config, random_model

Copy = Callable[..., Path]
SYSTEM = '{"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a river"}]}'
TWICE = '{"messages": [{"role": "user", "content": "One."}, {"role": "user", "content": "Two."}]}'


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(tmp_path_factory.mktemp("strict") / "m", template=STRICT_TEMPLATE, bos=True)


def test_a_chat_template_that_refuses(strict: Path, tmp_path: Path) -> None:
    refused(generate(strict, "--system", "Be brief."), "System role not supported")
    prompts = tmp_path / "p.jsonl"
    prompts.write_text(TWICE)
    refused(redrafter("generate", "-m", strict, "--prompts", prompts), "Roles must alternate")
    prompts.write_text(SYSTEM)
    bench = ("bench", "-m", strict, "--prompts", prompts, "--max-tokens", 4, "--draft", "2x3")
    refused(redrafter(*bench), "System role not supported")
    refused(
        redrafter("tune", "-m", strict, "--prompts", prompts, "--max-tokens", 8), "System role not supported"
    )
    assert generate(strict).code == 0


def test_a_chat_template_that_refuses_what_is_trained_on(strict: Path, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(SYSTEM)
    given = (
        "--out",
        tmp_path / "out",
        "--prompts",
        tmp_path / "p.jsonl",
        "--self-prompt",
        1,
        "--max-tokens",
        8,
    )
    refused(redrafter("train", "--model", strict, *given))


def test_a_chat_template_that_is_none(tmp_path: Path) -> None:
    refused(generate(random_model(tmp_path / "m", template=BROKEN_TEMPLATE)), "template")


def test_a_conversation_goes_on_after_a_turn_that_is_refused(strict: Path) -> None:
    lines = b"hi\n/system Be brief.\nhello\n/system\n/reset\n"
    done = redrafter("chat", "-m", strict, "--max-tokens", 4, "--draft", "off", stdin=lines)
    assert done.code == 0 and "Traceback" not in done.err
    assert done.err.count("error: ") == 1 and "System role not supported" in done.err
    assert done.err.count("tokens/s") == 2, "the message that was refused is not set"


def test_text_that_is_not_utf8(model: Path, tmp_path: Path) -> None:
    missing = tmp_path / "no-model"  # found before a model is looked for
    refused(redrafter("generate", "-m", missing, stdin=b"O\xf9 est"), "standard input", "byte 1 is 0xf9")
    refused(redrafter("generate", "-m", missing, b"caf\xe9"), "the prompt", "0xe9")
    refused(redrafter("generate", "-m", missing, "--stop", b"\xff", "hi"), "--stop")
    (tmp_path / "p.jsonl").write_text('{"prompt": "half of an emoji: \\ud83d"}')
    refused(redrafter("generate", "-m", missing, "--prompts", tmp_path / "p.jsonl"), "p.jsonl:1", "U+D83D")
    (tmp_path / "p.jsonl").write_bytes(b'"caf\xe9"')
    refused(redrafter("generate", "-m", missing, "--prompts", tmp_path / "p.jsonl"), "p.jsonl:1", "UTF-8")
    done = redrafter(
        "chat", "-m", model, "--max-tokens", 4, "--draft", "off", stdin=b"first\ncaf\xe9\nthird\n"
    )
    assert done.code == 0 and done.err.count("error: the message is") + done.err.count("must be UTF-8") == 1
    assert done.err.count("tokens/s") == 2


def test_first_uses_on_machines_that_stutter(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock of the cost measurement jumps at random."""
    loaded, rng = rd.load(model), random.Random(1)
    assert loaded.drafter is not None
    clock, lost = time.perf_counter, 0.0

    def stuttering() -> float:
        nonlocal lost
        lost += rng.choice((0.0, 0.0, 0.001, 0.05)) * rng.random()
        return clock() + lost

    monkeypatch.setattr(time, "perf_counter", stuttering)
    for _ in range(8):
        table = cost_table(loaded.target, loaded.drafter, fresh=True, on_measure=lambda: None)
        costs = [seconds for _, seconds in sorted(table.rows.items())]
        assert costs and all(0 < seconds < 60 for seconds in costs)
        assert rd.generate(loaded, "hi", max_tokens=4)[1].generated_tokens == 4


def test_no_limit_of_positions(copy: Copy) -> None:
    works_or_refused(generate(edit_config(copy(), max_position_embeddings=None)))


def test_no_standard_input(model: Path) -> None:
    refused(redrafter("generate", "-m", model), "no prompt")
    refused(redrafter("generate", "-m", model, "-"), "no prompt")
    assert redrafter("chat", "-m", model).code == 0


def test_no_standard_input_in_a_process(model: Path) -> None:
    """Number 0 is then given to the next file that is opened, which MLX would not read."""
    shell = 'exec "$0" -m apps generate hi -m "$1" --max-tokens 3 --draft off <&-'
    done = subprocess.run(["sh", "-c", shell, sys.executable, str(model)], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize("size", [96, 48])
def test_quantized_caches_of_any_head_size(tmp_path: Path, size: int) -> None:
    model = random_model(tmp_path / "m", head_dim=size)
    if not works_or_refused(done := generate(model, "--kv-bits", 8, "--draft", "2x3")):
        refused(done, "head", str(size))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"stop": [2]}, "stop"),
        ({"stop": "a"}, "stop"),
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 4.0}, "max_tokens"),
        ({"prompt": b"hi"}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": [1.5]}, "token ids"),
        ({"prompt": [10**6]}, "token ids"),
        ({"sampling": 3}, "sampling"),
        ({"draft": 3}, "draft"),
    ],
)
def test_values_of_the_apis_arguments(model: Path, arguments: dict[str, Any], named: str) -> None:
    given: dict[str, Any] = {"prompt": "hi", "max_tokens": 4, **arguments}
    with pytest.raises(ValueError, match=named):
        rd.generate(rd.load(model, "none"), given.pop("prompt"), **given)


def test_other_forms_of_right_arguments(model: Path) -> None:
    loaded, ids = rd.load(model, "none"), [2, 70, 71, 3]
    wanted = rd.generate(loaded, ids, max_tokens=4)[1].token_ids
    for form in (np.array(ids), mx.array(ids), list(np.array(ids))):
        assert rd.generate(loaded, form, max_tokens=4)[1].token_ids == wanted
    assert rd.generate(loaded, ids, max_tokens=4, stop=None)[1].token_ids == wanted
    with pytest.raises(ValueError, match="seed"):
        rd.Sampling(seed=1.5)


@pytest.mark.parametrize("seconds", [0.15, 0.3, 0.6])
def test_ctrl_c_in_the_first_moments(model: Path, seconds: float) -> None:
    """The interpreter's own start is not ours: before it has come to us there is nothing to see."""
    code = "import sys; print('begun', flush=True); sys.argv[0] = 'redrafter'; "
    code += "import redrafter_mlx; from apps.cli import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "generate", "hi", "-m", str(model), "--max-tokens", "400000"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    if b"more than the context" not in err:  # a machine so fast that it was refused before
        assert process.returncode in (130, -signal.SIGINT) and err.endswith(b"interrupted\n"), err.decode()
    assert b"Traceback" not in err, err.decode()

"""Random combinations of the options of every command, and what must hold of each: it works, no option of it having
been ignored, or it is one clear error.

`python -m tests.cases.combinations 2000 --seed 1` runs so many and prints counts.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from redrafter_mlx.auto import timing
from tests.cases.command import Result, convert, redrafter, refused
from tests.cases.models import random_model

NUMBERS = ["0", "1", "3", "-1", "1e400", "nan", "x", ""]
SAMPLING = {
    "--temperature": ["0.7", "0", "1e-40", *NUMBERS], "--top-p": ["0.5", *NUMBERS], "--top-k": ["5", *NUMBERS],
    "--min-p": ["0.1", *NUMBERS], "--seed": ["7", str(2**64 - 1), str(2**64), *NUMBERS],
}  # fmt: skip
DRAFT = {"--draft": ["auto", "off", "2x3", "2x3@4", "1x2", "9x9@200", "0x2", "2x1", "2", "", "AUTO", "300x2"]}
LOOKUP = {"--no-lookup": [], "--history": ["{out}", "{text}"]}
LOADED = {
    "--model": ["{model}", "{bare}", "{text}", "{missing}", ""],
    "--drafter": ["none", "{drafter}", "{model}", ""],
}
PROMPTS = {"--prompts": ["{prompts}", "{array}", "{empty}", "{missing}", "{model}", ""]}
TEXT = {"--max-tokens": ["1", "4", "9", "600", "0", "-3", "x"], "--stop": ["a", "\n", "", "zz"],
        "--system": ["Be brief.", "", "\udcff"], "--kv-bits": ["4", "8", "3", "x"]}  # fmt: skip
OUT = ["{out}", "{model}", "{text}/x", ""]
COMMANDS: dict[str, dict[str, list[str]]] = {
    "generate": {**LOADED, **LOOKUP, **DRAFT, **SAMPLING, **PROMPTS, **TEXT, "--raw": [], "--json": [],
                 "--repetition-penalty": ["1.2", *NUMBERS], "": ["hi", "- dash", "-", "", "caf\udce9", "--"]},
    "chat": {**LOADED, **LOOKUP, **DRAFT, **SAMPLING, **TEXT, "--repetition-penalty": ["1.2", *NUMBERS], "--resume": [],
             "": ["extra"]},
    "demo": {**LOADED, **DRAFT, "--no-lookup": [], "--max-tokens": TEXT["--max-tokens"], "": ["hi", "", "-", "\udc80"]},
    "bench": {**LOADED, **DRAFT, **PROMPTS, "--no-lookup": [], "--each": [],
              "--max-tokens": ["2", "4", "1", "600"], "--limit": ["1", "9", "0", "x"],
              "--temperature": SAMPLING["--temperature"], "--top-p": SAMPLING["--top-p"], "--seed": ["3", "-1"],
              "--draft-model": ["{model}", "{missing}"], "--context": ["16", "40", "15", "9999"], "--no-mlx-lm": [],
              "--profile": [], "--out": ["{out}"]},
    "tune": {**LOADED, **PROMPTS, "--no-lookup": [], "--limit": ["1", "0", "x"], "--max-tokens": ["8", "7"],
             "--predict": [], "--plot": ["{out}.png"]},
    "train": {"--model": LOADED["--model"], "--out": ["{out}"], "--prompts": PROMPTS["--prompts"],
              "--self-prompt": ["8", "0", "-1", "x"], "--max-tokens": ["8", "0"], "--rows": ["8", "0"],
              "--epochs": ["1", "0", "-1", "nan"], "--batch": ["32", "33", "0"], "--learning-rate": ["1e-3", "nan"],
              "--length": ["3", "1"], "--soft": ["0.5", "2"], "--reach": ["0.5", "-1"], "--exit-dim": ["32", "0"],
              "--layers": ["1", "-1"], "--draft-vocab": ["40", "0", "-1"], "--context-layers": ["none", "0", "99", "x"],
              "--start-from": ["{drafter}", "{missing}"], "--quantize": ["4", "3"], "--text": ["{missing}"],
              "--patience": ["1", "-1"], "--validate-every": ["5", "0"], "--seed": ["1", "-1"],
              "--minutes": ["0", "nan", "x"], "--allow-small": [], "--exclude": ["{prompts}", "{missing}"],
              "--disk-budget": ["1", "0", "nan"], "--loss": ["tv", "lk", "gumbel", "x"],
              "--depth-weights": ["dpace", "x"], "--from-history": ["{missing}", "{text}"]},
    "convert drafter": {"": ["{apples}", "{drafter}", "{model}", "{missing}", "{text}", ""], "--out": OUT,
                        "--target": ["{model}", "{missing}"], "--verify": ["{model}", "{missing}"],
                        "--activation": ["silu", "linear", "relu"],
                        "--dtype": ["float16", "float32", "int8"], "--force": []},
    "convert target": {"": ["{model}", "{bare}", "{missing}", "{text}", ""], "--out": OUT, "--quantize": [],
                       "--dequantize": [], "--bits": ["4", "8", "7"], "--group-size": ["32", "64", "33"],
                       "--dtype": ["float16", "bfloat16", "int8"], "--force": []},
    "convert export": {"": ["{drafter}", "{apples}", "{model}", "{missing}", ""], "--out": OUT,
                       "--target": ["{model}", "{missing}"], "--dtype": ["float16", "x"], "--force": []},
    "convert info": {"": ["{drafter}", "{apples}", "{model}", "{bare}", "{missing}", "{text}", ""],
                     "--target": ["{model}", "{missing}"]},
    "convert verify": {"": ["{drafter}", "{apples}", "{model}", "{missing}"], "--target": ["{model}", "{missing}"]},
}  # fmt: skip
"""Command -> option -> values; none: a flag. "" is the argument without a name, {name} a path of `Places`."""

USUAL = {"--model": "{model}", "--max-tokens": "4", "--prompts": "{prompts}", "--limit": "1", "--out": "{out}",
         "--self-prompt": "8", "--rows": "8", "--epochs": "1", "--batch": "32"}  # fmt: skip
"""What stands in for an option that was not drawn, where the command would otherwise take long or does not begin."""

NEEDED = {
    "generate": ["--model"], "chat": ["--model"], "demo": ["--model", "--max-tokens"],
    "bench": ["--model", "--max-tokens", "--prompts", "--limit"], "tune": ["--model", "--prompts", "--limit"],
    "train": ["--allow-small", "--model", "--out", "--self-prompt", "--rows", "--epochs", "--batch", "--max-tokens"],
    "convert drafter": ["--out"], "convert target": ["--out"], "convert export": ["--out"], "convert info": [],
    "convert verify": [],
}  # fmt: skip
WEIGHTS = {"generate": 30, "chat": 15, "demo": 10, "bench": 8, "tune": 2, "train": 6, "convert drafter": 8,
           "convert target": 8, "convert export": 6, "convert info": 5, "convert verify": 3}  # fmt: skip

Drawn = Mapping[str, str | None]
"""Option -> its value; None where it is a flag."""


@dataclass
class Places:
    """Models and files that the options name."""

    folder: Path
    paths: dict[str, Path] = field(default_factory=dict)
    number: int = 0

    def __post_init__(self) -> None:
        model = random_model(self.folder / "model")
        bare = Path(shutil.copytree(model, self.folder / "bare", ignore=shutil.ignore_patterns("drafter")))
        made = convert("export", model / "drafter", "--out", self.folder / "apples")
        assert made.code == 0, made
        texts = {"text": "x", "empty": "", "prompts": '"hi"\n{"prompt": "you"}\n', "array": '["hi"]'}
        for name, text in texts.items():
            (self.folder / name).write_text(text)
        self.paths = {name: self.folder / name for name in (*texts, "apples", "missing")}
        self.paths |= {"model": model, "bare": bare, "drafter": model / "drafter"}

    def fill(self, value: str) -> str:
        return value.format(**self.paths)

    def new_out(self) -> Path:
        """A name that nothing has yet."""
        self.number += 1
        self.paths["out"] = self.folder / f"out{self.number}"
        return self.paths["out"]


def draw(rng: random.Random) -> tuple[str, Drawn]:
    """A command with some of its options; most have a value that is one, or nothing would ever run."""
    command = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
    drawn: dict[str, str | None] = {}
    for option, values in COMMANDS[command].items():
        if option in NEEDED[command]:
            drawn[option] = USUAL.get(option) if rng.random() < 0.85 else rng.choice(values or [None])
        elif rng.random() < (0.9 if option == "" and command != "chat" else 0.2):
            drawn[option] = None if not values else values[0] if rng.random() < 0.9 else rng.choice(values)
    if "--prompts" in drawn and rng.random() < 0.7:
        drawn.pop("", None)
    return command, drawn


def run(command: str, drawn: Drawn, places: Places) -> Result:
    """Run it and check what must hold.

    Raises:
        AssertionError: something else came of it.
    """
    out, before = places.new_out(), _listing(places.folder)
    given: list[str] = []
    for option, value in drawn.items():
        filled = [] if value is None else [places.fill(value)]
        given += [option, *filled] if option else filled
    program, *words = command.split()
    if program == "convert":
        result = convert(*words, *given)
    else:
        result = redrafter(program, *given, stdin=b"hi\nyou\n" if program in ("chat", "generate") else None)
    try:
        if result.code == 0:
            assert "Traceback" not in result.err
            for option, value in drawn.items():
                check = HONORED.get((command, option)) or HONORED.get((command.split()[0], option))
                if check is not None:
                    check(result, places.fill(value or ""), drawn)
        else:
            refused(result)
            left = _listing(places.folder) - before
            assert command == "train" or not left, f"left behind: {sorted(left)}"
    finally:
        for path in places.folder.glob(f"{out.name}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return result


def _listing(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if "drafter" not in path.parts}


Check = Callable[[Result, str, Drawn], None]


def _lines(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.out.splitlines()]


def _stats(result: Result, drawn: Drawn) -> list[dict[str, Any]]:
    return [line["stats"] for line in _lines(result)] if "--json" in drawn else []


def _max_tokens(result: Result, value: str, drawn: Drawn) -> None:
    for stats in _stats(result, drawn):
        assert stats["generated_tokens"] <= int(value)
        assert stats["finish_reason"] == "stop" or stats["generated_tokens"] == int(value)


def _seed(result: Result, value: str, drawn: Drawn) -> None:
    assert all(stats["seed"] == int(value) for stats in _stats(result, drawn))


def _draft(result: Result, value: str, drawn: Drawn) -> None:
    for stats in _stats(result, drawn):
        if value == "off" or drawn.get("--drafter") == "none":
            assert stats["drafted_tokens"] == 0
        elif value != "auto" and stats["steps"]:
            assert stats["drafted_tokens"] > 0


def _stop(result: Result, value: str, drawn: Drawn) -> None:
    if "--json" in drawn:
        assert all(value not in line["text"] for line in _lines(result))


def _raw(result: Result, value: str, drawn: Drawn) -> None:
    for stats in _stats(result, drawn):
        assert stats["prompt_tokens"] < 9, "without the template's tokens"


def _system(result: Result, value: str, drawn: Drawn) -> None:
    assert all(stats["prompt_tokens"] >= len(value) + 4 for stats in _stats(result, drawn))


def _prompts(result: Result, value: str, drawn: Drawn) -> None:
    if "--json" in drawn:
        assert len(_lines(result)) == 2


def _out(result: Result, value: str, drawn: Drawn) -> None:
    assert Path(value).exists(), f"{value} was not written"


def _report(key: str, kind: Callable[[str], Any]) -> Check:
    def check(result: Result, value: str, drawn: Drawn) -> None:
        assert json.loads(result.out.splitlines()[-1])[key] == kind(value)

    return check


def _has(key: str) -> Check:
    def check(result: Result, value: str, drawn: Drawn) -> None:
        assert json.loads(result.out.splitlines()[-1]).get(key) is not None

    return check


def _lacks(key: str) -> Check:
    def check(result: Result, value: str, drawn: Drawn) -> None:
        assert json.loads(result.out.splitlines()[-1]).get(key) is None

    return check


def _config(result: Result, value: str, drawn: Drawn) -> dict[str, Any]:
    out = Path(result.out.split()[-1] if result.out.split() else "")
    found = json.loads((out / "config.json").read_text()) if (out / "config.json").is_file() else {}
    assert isinstance(found, dict)
    return found


def _quantized(result: Result, value: str, drawn: Drawn) -> None:
    config = _config(result, value, drawn)
    if config:
        wanted = {"bits": int(drawn.get("--bits") or 4), "group_size": int(drawn.get("--group-size") or 64)}
        assert {key: config["quantization"][key] for key in wanted} == wanted


def _shown_draft(result: Result, value: str, drawn: Drawn) -> None:
    assert f"drafted ({value})" in " ".join(result.out.split())


HONORED: dict[tuple[str, str], Check] = {
    ("generate", "--max-tokens"): _max_tokens, ("generate", "--seed"): _seed, ("generate", "--draft"): _draft,
    ("generate", "--stop"): _stop, ("generate", "--raw"): _raw, ("generate", "--system"): _system,
    ("generate", "--prompts"): _prompts, ("demo", "--draft"): _shown_draft,
    ("bench", "--draft"): _report("draft", str), ("bench", "--context"): _report("context", int),
    ("bench", "--temperature"): _report("temperature", float), ("bench", "--out"): _out,
    ("bench", "--limit"): _report("prompts", lambda value: min(2, int(value))),
    ("bench", "--no-mlx-lm"): _lacks("mlx_lm_tokens_per_second"), ("bench", "--profile"): _has("profile_ms"),
    ("bench", "--draft-model"): _has("mlx_lm_speculative_tokens_per_second"),
    ("tune", "--plot"): _out, ("tune", "--predict"): _lacks("measured_by_shape"),
    ("train", "--out"): _out, ("convert", "--out"): _out, ("convert target", "--quantize"): _quantized,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.cases.combinations", description=__doc__)
    parser.add_argument("count", type=int, nargs="?", default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--command", choices=COMMANDS, help="only this one")
    arguments = parser.parse_args(argv)
    rng, counts, wrong = random.Random(arguments.seed), Counter[tuple[str, str]](), 0
    timing.BUDGET_SECONDS = 0.05
    with tempfile.TemporaryDirectory() as folder:
        os.environ["REDRAFTER_CACHE"] = str(Path(folder, "cache"))
        Path(folder, "places").mkdir()
        places = Places(Path(folder, "places"))
        for _ in range(arguments.count):
            command, drawn = draw(rng)
            if arguments.command not in (None, command):
                continue
            try:
                outcome = "refused" if run(command, drawn, places).code else "worked"
            except AssertionError as error:
                outcome, wrong = "WRONG", wrong + 1
                print(f"{command} {dict(drawn)}\n    {str(error)[-600:]}", file=sys.stderr)
            counts[command, outcome] += 1
    for command in COMMANDS:
        found = {outcome: counts[command, outcome] for outcome in ("worked", "refused", "WRONG")}
        print(f"{command:16} {', '.join(f'{count} {outcome}' for outcome, count in found.items())}")
    print(f"{counts.total()} combinations, seed {arguments.seed}: {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

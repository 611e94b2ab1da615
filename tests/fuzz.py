"""Damaged files of every kind that is read: what the commands make of them.

Each case copies a tiny model, damages one of its files, and runs a command on it in a worker process. Right are an
answer and one line `error: ...` with exit code 2. Wrong are a traceback, a signal, a hang, code of the file that ran,
something half-made left behind, and success on damage that a reader can see ("silent": a file cut short or longer than
it says, an empty one, a Git LFS pointer, text that is not UTF-8, a weight that is not a number).
Run: python -m tests.fuzz [--cases 1000] [--seed 0] [--kinds folder gguf ...] [--out FILE]. The last line is one
JSON object; exit 1 where anything was wrong.
"""

from __future__ import annotations

import redrafter_mlx  # noqa: F401  (before mlx)

# isort: split
import argparse
import contextlib
import io
import json
import os
import queue
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from redrafter_mlx.files import new_file

from .fuzz_damage import NOT_FINITE, Damage, damages_of
from .fuzz_models import KINDS, MARKER, make

WRONG = ("traceback", "signal", "hang", "silent", "ran code", "left behind", "not one error")
SECONDS = 60.0
"""Longer than that is a hang; cases take a tenth of a second."""
GIGABYTES = 16


def run_case(made: Path, kind: str, seed: int) -> dict[str, Any]:
    """Damage a copy of a model as `seed` says, and run the kind's command on it, in this process."""
    rng = random.Random(f"{kind} {seed}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        shutil.copytree(made / kind, folder)
        file = folder / rng.choice(KINDS[kind].files)
        damage: Damage = rng.choice(damages_of(file))
        damage.apply(file, rng)
        (Path(name) / "out").mkdir()
        case = {"kind": kind, "seed": seed, "file": file.name, "damage": damage.name}
        return {**case, **_run(kind, folder, Path(name) / "out", damage)}


def _run(kind: str, folder: Path, out: Path, damage: Damage) -> dict[str, str]:
    said, answer = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(answer), contextlib.redirect_stderr(said):
            code = KINDS[kind].command(folder, out / "made")
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        return {"result": "traceback", "said": traceback.format_exc()[-600:]}
    lines = [line for line in said.getvalue().splitlines() if line.strip()]
    last = lines[-1][:300] if lines else ""
    if Path(MARKER).exists():
        Path(MARKER).unlink()
        return {"result": "ran code", "said": last}
    if code == 0:
        unseen = damage.name == NOT_FINITE and not KINDS[kind].reads_values
        return {"result": "silent" if damage.visible and not unseen else "loaded", "said": ""}
    if code != 2 or not last.startswith("error: ") or answer.getvalue().strip():
        return {"result": "not one error", "said": f"{code}: {last}"}
    if any(out.iterdir()):
        return {"result": "left behind", "said": str(sorted(out.iterdir()))}
    return {"result": "refused", "said": last}


def work(made: Path) -> None:
    """Run the cases that standard input names, a line each; one JSON object a case on standard output."""
    resource.setrlimit(resource.RLIMIT_AS, (GIGABYTES << 30,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    reply = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # whatever a library prints itself
    for line in sys.stdin:
        kind, seed = json.loads(line)
        reply.write(json.dumps(run_case(made, kind, seed)) + "\n")
        reply.flush()


class Worker:
    """A process that runs cases, and is started anew after one that ended it."""

    def __init__(self, made: Path) -> None:
        self._made = made
        self._process: subprocess.Popen[str] | None = None
        self._replies: queue.Queue[str] = queue.Queue()

    def _start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "tests.fuzz", "--work", str(self._made)]
        environment = {**os.environ, "REDRAFTER_CACHE": str(self._made / "cache"), "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=environment, cwd=Path(__file__).parents[1],
        )  # fmt: skip
        self._process, self._replies = process, queue.Queue()
        threading.Thread(target=_collect, args=(process, self._replies), daemon=True).start()
        return process

    def run(self, kind: str, seed: int) -> dict[str, Any]:
        """The result of a case, also where it ends the process or does not end."""
        process = self._process or self._start()
        assert process.stdin is not None
        process.stdin.write(json.dumps([kind, seed]) + "\n")
        process.stdin.flush()
        case = {"kind": kind, "seed": seed}
        try:
            reply = self._replies.get(timeout=SECONDS)
        except queue.Empty:
            self.close()
            return {**case, "result": "hang", "said": ""}
        if not reply:
            code = process.wait()
            self._process = None
            return {**case, "result": "signal", "said": f"ended with {code}"}
        result: dict[str, Any] = json.loads(reply)
        return result

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def _collect(process: subprocess.Popen[str], replies: queue.Queue[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        replies.put(line)
    replies.put("")  # it has ended


def fuzz(kinds: list[str], cases: int, seed: int) -> Iterator[dict[str, Any]]:
    """Run `cases` cases, in turn for each kind; a result each."""
    with tempfile.TemporaryDirectory() as name:
        made = Path(name)
        for kind in kinds:
            make(kind, made / kind)
        worker = Worker(made)
        try:
            for number in range(cases):
                yield worker.run(kinds[number % len(kinds)], seed + number)
        finally:
            worker.close()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="damaged files of every kind that is read")
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=tuple(KINDS), default=list(KINDS))
    parser.add_argument("--out", type=Path, help="where to write the result")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.work is not None:
        work(given.work)
        return 0
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in given.kinds}
    wrong = []
    for result in fuzz(given.kinds, given.cases, given.seed):
        counts[result["kind"]][result["result"]] += 1
        if result["result"] in WRONG:
            wrong.append(result)
            print(json.dumps(result), file=sys.stderr)
    total: Counter[str] = sum(counts.values(), Counter())
    found = {"cases": given.cases, "seed": given.seed, "total": total, "kinds": counts, "wrong": wrong[:40]}
    if given.out is not None:
        with new_file(given.out) as part:
            part.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

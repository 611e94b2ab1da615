"""Damaged inputs of every convert command: one clear error, or the very result that the whole input gives.

`python -m tests.test_convert_fuzz 500 1` does more of it: so many mutations, from that seed.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

import redrafter_mlx  # noqa: F401  (before mlx)

# isort: split
import mlx.core as mx
import numpy as np

from convert.__main__ import main
from redrafter_mlx.drafters.kinds import save_drafter
from redrafter_mlx.drafters.recurrent import DrafterConfig, RecurrentDrafter
from redrafter_mlx.loading.folder import load_folder
from tests.damage import damage_file
from tests.speculators import make_speculator, published
from tests.test_convert_speculator import IBM, save
from tests.test_convert_torch_file import write_torch

GOLDENS = Path(__file__).parent / "goldens"
MUTATIONS = 60  # of the short form


@dataclass(frozen=True)
class Case:
    """A whole input, and the command that takes it."""

    command: str
    source: Path


def sources(folder: Path) -> list[Case]:
    """An input of every kind: each container and dialect of drafters, targets, and drafters of ours."""
    dialects = GOLDENS / "dialects"
    cases = [
        Case("drafter", dialects / name)
        for name in ("model_pt", "pytorch_model_bin", "modelopt", "sharded", "trtllm_converted")
    ]
    legacy = folder / "legacy"
    shutil.copytree(dialects / "model_pt", legacy)
    shutil.copy(GOLDENS / "torch_files" / "legacy.pt", legacy / "model.pt")
    cases.append(Case("info", legacy))
    cases.append(Case("drafter", save(folder / "speculator", IBM, published(make_speculator()))))
    target = GOLDENS / "e2e" / "e00" / "target"
    cases.append(Case("target", target))
    cases.append(Case("target", torch_target(target, folder / "bin", shards=1)))
    cases.append(Case("target", torch_target(target, folder / "shards", shards=2)))
    mx.random.seed(0)
    save_drafter(RecurrentDrafter(DrafterConfig(64, 16, 24, 1)), folder / "ours")
    cases.append(Case("export", folder / "ours"))
    cases += [Case("info", case.source) for case in cases]
    return cases


def torch_target(target: Path, folder: Path, shards: int) -> Path:
    folder.mkdir()
    shutil.copy(target / "config.json", folder)
    loaded = mx.load(str(target / "model.safetensors"))
    assert isinstance(loaded, dict)
    arrays = {name: np.array(array) for name, array in loaded.items()}
    if shards == 1:
        write_torch(folder / "pytorch_model.bin", arrays)
        return folder
    names = [f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin" for i in range(shards)]
    where = {tensor: names[i % shards] for i, tensor in enumerate(arrays)}
    for name in names:
        write_torch(folder / name, {tensor: arrays[tensor] for tensor in where if where[tensor] == name})
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def run(case: Case, source: Path, out: Path) -> tuple[int, str, str]:
    """Exit code, standard output and standard error; whatever is raised goes on."""
    given = [case.command, str(source)] + ([] if case.command == "info" else ["--out", str(out)])
    with (
        contextlib.redirect_stdout(io.StringIO()) as stdout,
        contextlib.redirect_stderr(io.StringIO()) as stderr,
    ):
        code = main(given)
    return code, stdout.getvalue(), stderr.getvalue()


def result(case: Case, out: Path) -> tuple[object, ...]:
    """What a conversion says: the weights to the bit, and for a target its logits, which the config decides on too."""
    loaded = mx.load(str(out / "model.safetensors"))
    assert isinstance(loaded, dict)
    weights = tuple((name, np.array(array).tobytes()) for name, array in sorted(loaded.items()))
    if case.command != "target":
        return weights
    model, _, _ = load_folder(out)
    return (*weights, np.array(model(mx.array([[5, 9, 40, 7]]))).tobytes())


@cache
def whole(case: Case) -> tuple[object, ...]:
    """The result of the whole input."""
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "out"
        code, _, error = run(case, case.source, out)
        assert code == 0, error
        return () if case.command == "info" else result(case, out)


def wrong(case: Case, rng: np.random.Generator) -> str | None:
    """Damage an input and run its command: what is wrong with how that ends, None where nothing is."""
    with tempfile.TemporaryDirectory() as name:
        source, out = Path(name) / "source", Path(name) / "out"
        shutil.copytree(case.source, source)
        files = sorted(
            file for file in source.iterdir() if file.suffix in (".json", ".pt", ".bin", ".safetensors")
        )
        what = (
            f"{case.command} {case.source.name}, {damage_file(files[int(rng.integers(0, len(files)))], rng)}"
        )
        try:
            code, said, error = run(case, source, out)
        except BaseException as raised:  # a traceback of any kind is what is looked for
            return f"{what}: {type(raised).__name__}: {raised}"
        left = {file.name for file in Path(name).iterdir()} - {"source"}
        last = (error.strip().splitlines() or [""])[-1]
        if code == 2:
            clear = last.startswith("error: ") and len(last) < 2000 and not said and not left
            return None if clear else f"{what}: exit 2, {said!r}, {left}, {last[:300]!r}"
        if code != 0 or left - {"out"}:
            return f"{what}: exit {code}, {left}, {last[:300]!r}"
        if case.command == "info" or result(case, out) == whole(case):
            return None
        return f"{what}: another result, and nothing said"


@pytest.mark.slow
def test_damaged_inputs(tmp_path: Path) -> None:
    rng, cases = np.random.default_rng(0), sources(tmp_path)
    found = [wrong(cases[number % len(cases)], rng) for number in range(MUTATIONS)]
    assert [each for each in found if each] == []


if __name__ == "__main__":
    number, seed = (int(argument) for argument in sys.argv[1:3])
    with tempfile.TemporaryDirectory() as folder:
        generator, inputs = np.random.default_rng(seed), sources(Path(folder))
        problems = 0
        for index in range(number):
            if problem := wrong(inputs[index % len(inputs)], generator):
                problems += 1
                print(problem, flush=True)
    print(f"{number} mutations, {problems} problems")
    sys.exit(problems > 0)

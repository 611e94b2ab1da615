"""Giving MLX a fast BLAS: in a process of its own each, since mlx loads once. And the package without `cpu`."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from redrafter_mlx.cpu import blas

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="only Linux replaces the BLAS")
ROOT = Path(__file__).parents[1]


def run(code: str, folder: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    """A Python program in a process of its own, in which `folder` holds the package; its log is on stderr."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("REDRAFTER_")}
    return subprocess.run(
        [sys.executable, "-c", "import logging; logging.basicConfig(level='DEBUG')\n" + code],
        env={**inherited, "PYTHONPATH": str(folder), **env},
        cwd=folder,
        capture_output=True,
        text=True,
    )


# blas.py by itself as `b`, before redrafter_mlx is imported and preloads
ALONE = f"""
import ctypes, importlib.util, os
spec = importlib.util.spec_from_file_location("b", {blas.__file__!r})
b = importlib.util.module_from_spec(spec)
spec.loader.exec_module(b)
"""


@linux_only
def test_off_says_so() -> None:
    result = run("import redrafter_mlx", REDRAFTER_BLAS="off")
    assert result.returncode == 0 and result.stderr.count("BLAS: left as it is") == 1


@linux_only
def test_unloadable_path_is_an_error() -> None:
    result = run("import redrafter_mlx", REDRAFTER_BLAS="/no/such/lib.so")
    assert result.returncode != 0 and "REDRAFTER_BLAS must be 'off' or a loadable library" in result.stderr


@linux_only
def test_warns_once_when_only_the_reference_blas_is_there() -> None:
    code = """
b._candidates = lambda: iter(())
b.importlib.util.find_spec = lambda name: None
b.preload()
print(b.loaded())
"""
    result = run(ALONE + code)
    assert result.stdout.strip() == "None"
    assert result.stderr.count("no fast BLAS found") == 1 and "pip install cmeel-openblas" in result.stderr


@linux_only
def test_openblas_needs_no_fortran_runtime_of_the_system() -> None:
    """Found under the name that OpenBLAS asks for, though MLX's wheel calls it otherwise."""
    code = """
b._load_fortran()
ctypes.CDLL(b.FORTRAN)
print(open('/proc/self/maps').read().count('memfd:libgfortran'))
"""
    result = run(ALONE + code)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 0


@linux_only
def test_a_library_that_does_not_load_is_named_and_the_next_taken() -> None:
    code = """
real = list(b._candidates())
b._candidates = lambda: iter(['/no/such/lib.so', *real])
b.preload()
print(b.loaded() == real[0], b._WAIT[0] in os.environ)
"""
    result = run("import os; os.environ.pop('OPENBLAS_THREAD_TIMEOUT', None)" + ALONE + code)
    assert result.stdout.strip() == "True False"
    assert result.stderr.count("WARNING:redrafter_mlx:BLAS: /no/such/lib.so does not load") == 1


@linux_only
@pytest.mark.parametrize(("intel", "first"), [(True, "mkl"), (False, "openblas")])
def test_the_vendor_decides_which_comes_first(
    intel: bool, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where both are installed, as MKL is where somebody asked for it."""
    monkeypatch.setattr(blas, "_is_intel", lambda: intel)
    monkeypatch.setattr(blas, "_installed", lambda package, library: iter([f"/installed/{library}"]))
    names = [name for path in blas._candidates() for name in ("mkl", "openblas") if f"lib{name}" in path]
    assert names[:2] == [first, "openblas" if intel else "mkl"]


def test_mkl_comes_only_where_it_is_asked_for() -> None:
    """With MKL nothing is tiled, so that a plain install on an Intel machine must not take it."""
    requirements = importlib.metadata.requires("redrafter-mlx") or []
    assert any(each.startswith("cmeel-openblas") and "extra" not in each for each in requirements)
    mkl = [each for each in requirements if each.startswith("mkl")]
    assert mkl and all('extra == "mkl"' in each for each in mkl)


@linux_only
def test_an_intel_machine_without_mkl_takes_openblas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas, "_is_intel", lambda: True)
    monkeypatch.setattr(
        blas,
        "_installed",
        lambda package, library: iter([] if package == "mkl" else [f"/installed/{library}"]),
    )
    assert next(blas._candidates()) == "/installed/libopenblas.so"


@linux_only
def test_too_late_after_mlx() -> None:
    result = run("import mlx.core; import redrafter_mlx")
    assert "mlx was imported before redrafter_mlx" in result.stderr


@linux_only
@pytest.mark.parametrize(("own", "expected"), [({}, "10"), ({"OPENBLAS_THREAD_TIMEOUT": "20"}, "20")])
def test_openblas_threads_sleep_soon_unless_told_otherwise(own: dict[str, str], expected: str) -> None:
    """OpenBLAS reads the variable while it is loaded."""
    code = """
b._load = lambda path: print(os.environ['OPENBLAS_THREAD_TIMEOUT'])
b.preload()
"""
    unset = "" if own else "import os; os.environ.pop('OPENBLAS_THREAD_TIMEOUT', None)"
    assert run(unset + ALONE + code, **own).stdout.strip() == expected


@linux_only
@pytest.mark.parametrize("own", [{}, {"OPENBLAS_THREAD_TIMEOUT": "20"}])
def test_no_environment_variable_is_changed(own: dict[str, str]) -> None:
    """Neither for the process nor for the children it starts, which inherit what C's `environ` holds."""
    code = """
import os, subprocess
before = dict(os.environ)
env = lambda: subprocess.run(["env", "-0"], capture_output=True).stdout
inherited = env()
import redrafter_mlx, mlx.core
from redrafter_mlx.cpu import blas
print(blas.loaded() is not None, dict(os.environ) == before, env() == inherited)
"""
    unset = "" if own else "import os; os.environ.pop('OPENBLAS_THREAD_TIMEOUT', None)"
    result = run(unset + code, **own)
    assert result.stdout.strip() == "True True True", result.stderr


@pytest.mark.slow
@linux_only
def test_malloc_is_changed_by_commands_alone() -> None:
    """Importing and generating set no option of malloc, which the whole process shares."""
    code = """
import ctypes
used = []
find = ctypes.CDLL.__getattr__
ctypes.CDLL.__getattr__ = lambda self, name: (used.append(name), find(self, name))[1]
from tests.toy import make
from redrafter_mlx import generate
generate(make(), [1, 2, 3], max_tokens=4, draft="2x3")
print("mallopt" in used)
from redrafter_mlx import kernels
kernels.keep_freed_memory()
print("mallopt" in used)
"""
    result = run(code)
    assert result.stdout.split() == ["False", "True"], result.stderr


# The forms for a CPU differ by rounding, and a tiny model's choices are clear ones. The prompt is long enough for every
# form to be taken.
GENERATE = """
from tests.toy import make
import redrafter_mlx
from redrafter_mlx import Sampling, generate, kernels
print(redrafter_mlx.__file__, kernels._on_cpu())
prompt = [7 * i % 61 for i in range(100)]
for temperature in (0.0, 1.0):
    for draft in ("off", "3x4@8"):
        model = make(head="factored")
        model.drafter.eval()
        model.drafter.attach(model.target)
        sampling = Sampling(temperature=temperature, seed=3)
        print(generate(model, prompt, max_tokens=30, sampling=sampling, draft=draft)[1].token_ids)
"""


@pytest.fixture(scope="module")
def generated() -> list[str]:
    """Tokens as the package generates them on this machine."""
    result = run(GENERATE)
    assert result.returncode == 0, result.stderr
    where, *tokens = result.stdout.splitlines()
    assert where.startswith(str(ROOT)) and tokens[0] == tokens[1] != tokens[2] == tokens[3]
    return tokens


@pytest.mark.slow
def test_the_switch_leaves_the_tokens_as_they_are(generated: list[str]) -> None:
    where, *tokens = run(GENERATE, REDRAFTER_CPU="off").stdout.splitlines()
    assert where.endswith(" False") and tokens == generated


@pytest.mark.slow
def test_without_the_folder_the_tokens_are_the_same(generated: list[str], tmp_path: Path) -> None:
    shutil.copytree(
        ROOT / "redrafter_mlx",
        tmp_path / "redrafter_mlx",
        ignore=shutil.ignore_patterns("cpu", "assets", "__pycache__"),
    )
    (tmp_path / "tests").mkdir()
    for name in ("__init__.py", "toy.py"):
        shutil.copy(ROOT / "tests" / name, tmp_path / "tests")
    # an editable install would find the folder in the checkout
    only_here = (
        "import sys; sys.meta_path[:] = [each for each in sys.meta_path if 'ditable' not in str(each)]"
    )
    result = run(only_here + GENERATE, tmp_path)
    assert result.returncode == 0, result.stderr
    where, *tokens = result.stdout.splitlines()
    assert where == f"{tmp_path / 'redrafter_mlx' / '__init__.py'} False" and tokens == generated

"""Taking over the BLAS: in a process of its own each, since mlx loads once."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from redrafter_mlx import blas

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="only Linux replaces the BLAS")


def run(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    prefix = "import logging; logging.basicConfig(level='DEBUG');"
    return subprocess.run(
        [sys.executable, "-c", prefix + code],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )


# blas.py by itself, before redrafter_mlx is imported and takes over
ALONE = (
    "import ctypes, importlib.machinery as im, pathlib, sys;"
    "p = [q for q in map(pathlib.Path, sys.path) if (q / 'redrafter_mlx' / 'blas.py').exists()][0];"
    "b = im.SourceFileLoader('b', str(p / 'redrafter_mlx' / 'blas.py')).load_module();"
)


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
    code = (
        "b._candidates = lambda: iter(()); b.importlib.util.find_spec = lambda n: None; print(b.take_over())"
    )
    result = run(ALONE + code, PYTHONPATH=os.getcwd())
    assert result.stdout.strip() == "None"
    assert result.stderr.count("no fast BLAS found") == 1 and "pip install cmeel-openblas" in result.stderr


@linux_only
def test_openblas_needs_no_fortran_runtime_of_the_system() -> None:
    """Found under the name that OpenBLAS asks for, though MLX's wheel calls it otherwise."""
    code = "b._load_fortran(); ctypes.CDLL(b.FORTRAN); print(open('/proc/self/maps').read().count('memfd:libgfortran'))"
    result = run(ALONE + code, PYTHONPATH=os.getcwd())
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 0


@linux_only
def test_a_library_that_does_not_load_is_named_and_the_next_taken() -> None:
    code = (
        "real = list(b._candidates()); b._candidates = lambda: iter(['/no/such/lib.so', *real]);"
        "print(b.take_over() == real[0])"
    )
    result = run(ALONE + code, PYTHONPATH=os.getcwd())
    assert result.stdout.strip() == "True"
    assert result.stderr.count("WARNING:redrafter_mlx:BLAS: /no/such/lib.so does not load") == 1


@linux_only
@pytest.mark.parametrize(("intel", "first"), [(True, "mkl"), (False, "openblas")])
def test_the_vendor_decides_which_comes_first(
    intel: bool, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blas, "_is_intel", lambda: intel)
    names = [name for path in blas._candidates() for name in ("mkl", "openblas") if f"lib{name}" in path]
    assert names[0] == first and len(set(names)) == 2


@linux_only
def test_too_late_after_mlx() -> None:
    result = run("import mlx.core; import redrafter_mlx")
    assert "mlx was imported before redrafter_mlx" in result.stderr


@linux_only
@pytest.mark.parametrize(("own", "expected"), [({}, "10"), ({"OPENBLAS_THREAD_TIMEOUT": "20"}, "20")])
def test_openblas_threads_sleep_soon_unless_told_otherwise(own: dict[str, str], expected: str) -> None:
    code = "import os; {}import redrafter_mlx; print(os.environ['OPENBLAS_THREAD_TIMEOUT'])"
    unset = "" if own else "os.environ.pop('OPENBLAS_THREAD_TIMEOUT', None); "
    assert run(code.format(unset), **own).stdout.strip() == expected

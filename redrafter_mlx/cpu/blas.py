"""Give MLX a fast BLAS on Linux.

The Linux CPU wheel of MLX links the reference BLAS, about 50 times slower in float32 than others.
Loading MKL or OpenBLAS into the process with its symbols visible *before* `mlx.core` makes the
dynamic linker resolve MLX's `cblas_*` calls there. macOS (Accelerate, Metal) needs none of this.

OpenBLAS comes first, but on an Intel machine where somebody installed MKL (`pip install redrafter-mlx[mkl]`). On
other machines MKL takes kernels of ten years ago, which pack the weights anew for every few rows, while OpenBLAS
costs nearly the same for 2 to 8 rows (docs/notes/cpu.md).

OpenBLAS' wheel asks for a Fortran runtime that few systems have installed. MLX's own wheel holds one under
another name; it is loaded from there.

`REDRAFTER_BLAS=off` leaves MLX's own BLAS in place; `REDRAFTER_BLAS=/path/to/lib.so` loads that file.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.metadata
import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

ENV = "REDRAFTER_BLAS"
FIX = "pip install cmeel-openblas"
FORTRAN = "libgfortran.so.5"

# OpenBLAS' threads wait for work in a loop of 2^26 cycles, 20 ms, which takes the core from the thread that builds
# MLX's graph; after 2^10 cycles they sleep. Read when the library is loaded.
_WAIT = ("OPENBLAS_THREAD_TIMEOUT", "10")

# glibc's malloc.h: M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD (bytes), M_ARENA_MAX
_MALLOPT = {-4: 0, -1: 2**31 - 1, -2: 1 << 26, -8: 1}

_log = logging.getLogger("redrafter_mlx")


def _installed(package: str, library: str) -> Iterator[str]:
    """Files of that name that pip's `package` put beside this interpreter."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        return
    for file in files:
        path = Path(str(file.locate())).resolve()
        if file.name.startswith(library) and path.is_file():
            yield str(path)


def _load(path: str) -> None:
    """Load a library with its symbols visible to what is loaded later.

    Raises:
        OSError: it cannot be loaded.
    """
    try:
        ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        if FORTRAN not in str(error):
            raise
        _load_fortran()
        ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)


def _load_fortran() -> None:
    """Load the Fortran runtime that came with MLX, whose LAPACK is in Fortran too.

    The linker looks for it by the name written in it, and in MLX's wheel that has a digest in the middle. So a copy
    with the usual name is made, in memory.
    """
    found = next(_installed("mlx-cpu", "libgfortran"), None)
    if found is None:
        return
    for path in _installed("mlx-cpu", "libquadmath"):  # it needs this one, by the name with a digest
        ctypes.CDLL(path)
    own = Path(found).name.encode() + b"\0"
    usual = (FORTRAN.encode() + b"\0").ljust(len(own), b"\0")
    with open(os.memfd_create(FORTRAN), "r+b") as file:
        file.write(Path(found).read_bytes().replace(own, usual))
        file.flush()
        ctypes.CDLL(f"/proc/self/fd/{file.fileno()}")


def _is_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def _candidates() -> Iterator[str]:
    """Libraries to try, best first."""
    found = [_installed("cmeel-openblas", "libopenblas.so"), _installed("mkl", "libmkl_rt.so")]
    for libraries in reversed(found) if _is_intel() else found:
        yield from islice(libraries, 1)  # the others are the same file under other names
    system = ctypes.util.find_library("openblas")
    if system:
        yield system


def keep_freed_memory() -> None:
    """Have glibc keep large freed blocks for the next array instead of returning them to the kernel.

    For a program of our own, not for a library: the whole process then has one arena and keeps its memory.

    MLX's CPU backend takes every array from malloc. By default those over 128 KiB are mapped and unmapped
    each time, and the page faults cost more than the arithmetic (about 6x on large element-wise
    operations).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # absent in musl
    if mallopt is not None:
        for option, value in _MALLOPT.items():
            mallopt(option, value)


def openblas_threads(path: str | None, kernels: Iterable[str]) -> int:
    """How many threads the OpenBLAS at `path` computes with; 0 where it is none, or not one with these kernels."""
    if path is None:
        return 0
    library = ctypes.CDLL(path)
    try:
        library.openblas_get_corename.restype = ctypes.c_char_p
        name = library.openblas_get_corename().decode()
        return int(library.openblas_get_num_threads()) if name.upper() in kernels else 0
    except AttributeError:
        return 0


_loaded: str | None = None


def loaded() -> str | None:
    """Path of the BLAS that `preload` loaded; None where MLX has its own."""
    return _loaded


def preload() -> None:
    """Load a fast BLAS for MLX, where there is one to load. Nothing else of the process changes.

    Raises:
        ValueError: `REDRAFTER_BLAS` names a file that cannot be loaded.
    """
    global _loaded
    wanted = os.environ.get(ENV, "")
    if sys.platform != "linux" or wanted.lower() == "off":
        _log.debug("BLAS: left as it is (%s)", wanted or sys.platform)
        return
    if "mlx.core" in sys.modules:
        _log.debug("BLAS: mlx.core was imported before redrafter_mlx, too late to replace it")
        warnings.warn(
            "mlx was imported before redrafter_mlx, so its slow reference BLAS stays; "
            "import redrafter_mlx first",
            RuntimeWarning,
            stacklevel=3,
        )
        return
    for path in [wanted] if wanted else _candidates():
        try:
            _load_without_spinning(path)
        except OSError as error:
            if wanted:
                raise ValueError(f"{ENV} must be 'off' or a loadable library: {error}") from None
            _log.warning("BLAS: %s does not load (%s), trying the next best", path, error)
            continue
        _log.debug("BLAS: mlx uses %s", path)
        _loaded = path
        return
    if importlib.util.find_spec("mlx_cuda") is None:  # with a GPU the CPU's BLAS hardly matters
        warnings.warn(
            f"no fast BLAS found, mlx runs ~50x slower in float32 on this CPU; {FIX}",
            RuntimeWarning,
            stacklevel=3,
        )


def _load_without_spinning(path: str) -> None:
    """Load a library; the variable that OpenBLAS reads while it loads is not left for child processes."""
    name, value = _WAIT
    if name in os.environ:
        return _load(path)
    os.environ[name] = value
    try:
        _load(path)
    finally:
        del os.environ[name]

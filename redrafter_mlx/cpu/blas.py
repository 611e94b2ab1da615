"""Give MLX a fast BLAS on Linux.

The Linux CPU wheel of MLX links the reference BLAS, which is about 50 times slower in float32 than others. If MKL or
OpenBLAS is loaded into the process *before* `mlx.core`, with its symbols visible, the dynamic linker resolves MLX's
`cblas_*` calls to it. macOS (Accelerate, Metal) needs none of this.

OpenBLAS is preferred, except on an Intel machine with MKL installed (`pip install redrafter-mlx[mkl]`). On other
machines MKL chooses kernels for processors of ten years ago, which reorder the weights at every multiplication, while
OpenBLAS with tiled weights costs nearly the same for 2 to 8 rows (docs/notes/cpu.md).

OpenBLAS' wheel needs a Fortran runtime that few systems have. MLX's own wheel contains one under another name, which is
loaded instead.

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
    """Files whose names begin with `library` in the installed `package`."""
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
    """Load the Fortran runtime of MLX's wheel, whose LAPACK needs it too.

    The linker finds a library by its soname, and in MLX's wheel the soname contains a digest. Therefore a copy with the
    usual soname is made, in memory.
    """
    found = next(_installed("mlx-cpu", "libgfortran"), None)
    if found is None:
        return
    for path in _installed("mlx-cpu", "libquadmath"):  # which the runtime needs, under its own soname
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

    For commands, not for a library: the whole process then has one arena and never returns memory.

    MLX's CPU backend allocates every array with malloc. By default arrays over 128 KiB are mapped and unmapped each
    time, and the page faults cost more than the arithmetic: large element-wise operations take about six times as long.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # absent in musl
    if mallopt is not None:
        for option, value in _MALLOPT.items():
            mallopt(option, value)


def openblas_threads(path: str | None, kernels: Iterable[str]) -> int:
    """Threads of the OpenBLAS at `path`; 0 if it is another library, or runs none of these `kernels`."""
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
    """Path of the BLAS that `preload` loaded; None where MLX uses its own."""
    return _loaded


def preload() -> None:
    """Load a fast BLAS for MLX if one is installed. Nothing else in the process changes.

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
    """Load a library with the environment variable that OpenBLAS reads on loading; children do not inherit it."""
    name, value = _WAIT
    if name in os.environ:
        return _load(path)
    os.environ[name] = value
    try:
        _load(path)
    finally:
        del os.environ[name]

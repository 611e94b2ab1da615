"""One training at a time in a folder."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import mlx.core as mx

try:
    import fcntl
except ImportError:  # Windows, where MLX does not run either
    fcntl = None  # type: ignore[assignment]

_log = logging.getLogger("redrafter_mlx")

LOCK = ".lock"


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Make `folder` if need be and keep it for this process while the block runs. A folder that is empty at the end,
    because the run failed before it wrote anything, is removed. Of several processes that train together
    (`mlx.launch`) the first keeps it for all.

    Raises:
        ValueError: another process keeps it, or it is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out must be a folder, and {folder} is a file")
    if mx.distributed.init().rank():
        yield
        return
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # another process removed the folder meanwhile
            descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
            if _is_taken(folder, descriptor):
                break
            os.close(descriptor)
    try:
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        os.close(descriptor)
        with suppress(OSError):  # not empty, as a rule
            for path in missing or [folder]:
                path.rmdir()


def _is_taken(folder: Path, descriptor: int) -> bool:
    """Lock the open file. False if it is no longer the one in the folder, its owner having ended.

    Raises:
        ValueError: another process has it.
    """
    if fcntl is None:
        return True
    path = folder / LOCK
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(descriptor, 32).decode(errors="replace").strip() or "not known"
        os.close(descriptor)
        raise ValueError(
            f"another training (process {owner}) is running in {folder}: wait for it, or use another --out"
        ) from None
    except OSError as error:
        _log.warning("%s cannot be locked (%s): run no second training in it", folder, error)
    try:
        is_same = os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
    if is_same:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
    return is_same

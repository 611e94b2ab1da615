"""Input that was refused though it is right, or with words that did not help, or shown badly."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cases.command import ROOT, convert, generate, redrafter, refused, works_or_refused
from tests.cases.gguf_file import save_gguf
from tests.cases.models import edit_config, edit_header, random_model

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'5e' * 32}\nsize 131009\n"
Copy = Callable[..., Path]


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "tokenizer.json",
        "config.json",
        "drafter/model.safetensors",
        "drafter/config.json",
    ],
)
def test_a_git_lfs_pointer_in_place_of_a_file(copy: Copy, name: str) -> None:
    folder = copy()
    (folder / name).write_text(POINTER)
    refused(generate(folder), "Git LFS", Path(name).name)


def test_a_git_lfs_pointer_in_place_of_a_gguf(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_text(POINTER)
    refused(generate(tmp_path / "x.gguf"), "Git LFS", "x.gguf")


class _Hub(http.server.BaseHTTPRequestHandler):
    """A hub that says no, as the real one does."""

    ANSWERS = {
        "gated": (
            403,
            {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model any/gated is restricted."},
        ),
        "private": (401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
        "missing": (404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}),
        "busy": (429, {}),
    }

    def do_GET(self) -> None:
        code, headers = next((a for name, a in self.ANSWERS.items() if name in self.path), (404, {}))
        self.send_response(code)
        for name, text in {**headers, "Content-Length": "2"}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(b"{}")

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def _process(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, where its environment matters."""
    given = [sys.executable, "-m", "apps", *map(str, arguments)]
    where = {**os.environ, "HF_HUB_DISABLE_TELEMETRY": "1", **environment}
    return subprocess.run(
        given, cwd=ROOT, env=where, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120
    )


@pytest.mark.parametrize(
    ("name", "words"), [("gated", ("log in",)), ("private", ("log in",)), ("missing", ("any/missing",))]
)
def test_a_hub_that_refuses(hub: str, name: str, words: tuple[str, ...], tmp_path: Path) -> None:
    done = _process("generate", "hi", "-m", f"any/{name}", HF_ENDPOINT=hub, HF_HOME=str(tmp_path))
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and last.startswith("error: ") and "Traceback" not in done.stderr, done.stderr
    assert not last.endswith("Client Error.") and all(word in last for word in words), last


def test_no_network(tmp_path: Path) -> None:
    done = _process("generate", "hi", "-m", "a/b", HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path))
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, (
        done.stderr
    )


def test_eight_bit_floats_with_scales_are_named(copy: Copy) -> None:
    folder = copy(drafter=False)

    def change(header: dict[str, object], data: bytes) -> tuple[dict[str, object], bytes]:
        entries: dict[str, object] = {}
        for name, entry in header.items():
            if name.endswith("_proj.weight"):
                entries[f"{name}_scale_inv"] = {
                    "dtype": "F32",
                    "shape": [1],
                    "data_offsets": [len(data), len(data) + 4],
                }
                data += bytes(4)
            entries[name] = entry
        return entries, data

    edit_header(folder / "model.safetensors", change)
    edit_config(
        folder, quantization_config={"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    )
    refused(generate(folder), "FP8")


@pytest.mark.parametrize("method", ["awq", "gptq", "bitsandbytes"])
def test_other_formats_are_named(copy: Copy, method: str) -> None:
    refused(generate(edit_config(copy(drafter=False), quantization_config={"quant_method": method})), method)


def test_pytorch_weights_only(copy: Copy) -> None:
    folder = copy(drafter=False)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(generate(folder), "redrafter-convert target")


def test_a_part_of_a_split_gguf(tmp_path: Path) -> None:
    def is_block(name: str) -> bool:
        return name.startswith("blk")

    for number, keep in ((1, lambda name: not is_block(name)), (2, is_block)):
        part = tmp_path / f"tiny-0000{number}-of-00002.gguf"
        save_gguf(part, {"split.count": 2, "split.no": number - 1}, keep=keep)
    if not works_or_refused(done := generate(tmp_path / "tiny-00001-of-00002.gguf")):
        refused(done, "1 of 2")


def test_a_gguf_by_another_name(tmp_path: Path) -> None:
    """In capitals, in Ollama's store, alone in a folder."""
    path = save_gguf(tmp_path / "TINY.GGUF")
    wanted = generate(save_gguf(tmp_path / "tiny" / "x.gguf")).tokens
    (tmp_path / "sha256-0123abcd").write_bytes(path.read_bytes())
    for model in (path, tmp_path / "sha256-0123abcd", tmp_path / "tiny"):
        assert generate(model).tokens == wanted


def test_no_model_type(copy: Copy) -> None:
    refused(generate(edit_config(copy(), without=("model_type",))), "config.json", "model_type")


def test_dynamic_rope_with_a_drafter(copy: Copy) -> None:
    model = edit_config(copy(), rope_scaling={"type": "dynamic", "factor": 2.0})
    plain = generate(model, "--drafter", "none").tokens
    if works_or_refused(done := generate(model, "--draft", "2x3")):
        assert done.tokens == plain
    else:
        refused(done, "cannot verify a token tree", "--drafter none")


@pytest.mark.parametrize("kind", ["yarn", "linear"])
def test_a_context_stretched_by_rope_scaling(tmp_path: Path, kind: str) -> None:
    scaling = {"type": kind, "factor": 4.0, "original_max_position_embeddings": 64}
    model = random_model(tmp_path / "m", max_position_embeddings=64, rope_scaling=scaling)
    assert generate(model, "--max-tokens", 8, prompt="x" * 80).code == 0
    refused(generate(model, "--max-tokens", 8, prompt="x" * 300), "256")


@pytest.mark.parametrize(
    "command",
    [
        '"$0" -m apps generate hi -m "$1" --max-tokens 400 --draft off',
        '"$0" -m convert info "$1"',
        '"$0" -m apps demo hi -m "$1" --max-tokens 4 --draft 2x3',
        '"$0" -m apps generate --help',
    ],
)
def test_a_reader_that_leaves(model: Path, command: str) -> None:
    given = ["bash", "-c", f"{command} | head -c 3; exit ${{PIPESTATUS[0]}}", sys.executable, str(model)]
    done = subprocess.run(given, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode in (0, 141), done
    assert "rror" not in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_output_that_cannot_hold_every_character(model: Path, encoding: str) -> None:
    given = ("generate", "hi", "-m", model, "--max-tokens", 60, "--draft", "off")
    done, whole = _process(*given, PYTHONIOENCODING=encoding), redrafter(*given)
    assert done.returncode == 0, done.stderr
    replaced = whole.out.encode(encoding, "replace").decode(encoding)
    assert done.stdout.replace("\r", "\n") == replaced.replace("\r\n", "\n").replace("\r", "\n")


def test_notes_stand_before_or_after_the_answer(model: Path) -> None:
    """Both streams in one file, as in a terminal."""
    given = ["sh", "-c", '"$0" -m apps generate hi -m "$1" --max-tokens 40 2>&1', sys.executable, str(model)]
    done = subprocess.run(given, cwd=ROOT, capture_output=True, stdin=subprocess.DEVNULL)
    answer = redrafter("generate", "hi", "-m", model, "--max-tokens", 40).out.encode(errors="replace")
    assert answer in done.stdout


def test_too_little_to_train_on(model: Path, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a fox"}\n{"prompt": "rain"}\n')
    given = ("--prompts", tmp_path / "p.jsonl", "--self-prompt", 1, "--max-tokens", 8)
    refused(redrafter("train", "--model", model, "--out", tmp_path / "out", *given), "too little")


@pytest.mark.parametrize("columns", ["20", "30"])
def test_figures_are_whole_in_narrow_terminals(
    model: Path, tmp_path: Path, columns: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    done = redrafter("demo", "hi", "-m", model, "--max-tokens", 8, "--draft", "2x3")
    assert done.code == 0 and "…" not in done.out and "1.00x" in done.out
    (tmp_path / "p.jsonl").write_text('"a"\n')
    given = ("--max-tokens", 8, "--prompts", tmp_path / "p.jsonl")
    done = redrafter("bench", "-m", model, "--draft", "2x3", *given)
    assert f"{done.line()['tokens_per_second']:.1f}" in done.err and "…" not in done.err
    done = redrafter("tune", "-m", model, "--predict", *given)
    assert "…" not in done.err and f"{done.line()['predicted_by_shape']['8x5']:.2f}" in done.err


@pytest.mark.parametrize("text", ['["a", "b"]', '[\n  {"prompt": "a"},\n  {"prompt": "b"}\n]\n'])
def test_an_array_instead_of_lines(model: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "p.json").write_text(text)
    done = redrafter("generate", "-m", model, "--prompts", tmp_path / "p.json", "--json", "--max-tokens", 2)
    refused(done, "one JSON value a line")


@pytest.mark.parametrize("prompt", ["- name a river", "-5 degrees", "--- three dashes"])
def test_a_prompt_that_begins_with_a_dash(model: Path, prompt: str) -> None:
    refused(generate(model, prompt=prompt), "goes behind --")
    given = ("generate", "-m", model, "--max-tokens", 2, "--json", "--", prompt)
    assert redrafter(*given).line()["stats"]["prompt_tokens"] == len(prompt) + 3


def test_piped_text_joins_the_prompt(model: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("some text\n")
    shell = 'cat "$2" | "$0" -m apps generate explain -m "$1" --max-tokens 2 --json'
    given = ["sh", "-c", shell, sys.executable, str(model), str(tmp_path / "text")]
    done = subprocess.run(given, cwd=ROOT, capture_output=True, text=True)
    assert json.loads(done.stdout)["stats"]["prompt_tokens"] == len("explain\n\nsome text") + 3


def test_a_model_without_a_drafter_says_how_it_decodes(copy: Copy) -> None:
    done = generate(copy(drafter=False))
    assert done.code == 0 and done.err.count("has no drafter") == 1
    assert "drafter" not in generate(copy("b", drafter=False), "--drafter", "none").err


def test_names_with_brackets(tmp_path: Path, model: Path) -> None:
    """MLX's and mlx-lm's patterns would find nothing there."""
    folder = Path(shutil.copytree(model, tmp_path / "models [old]" / "mine [a-z]"))
    wanted = generate(model).tokens
    assert generate(folder).tokens == generate(model, "--drafter", folder / "drafter").tokens == wanted
    assert convert("target", folder, "--out", tmp_path / "out [new]").code == 0
    assert generate(tmp_path / "out [new]", "--drafter", "none").tokens == wanted
    assert generate(save_gguf(tmp_path / "gguf [4]" / "x.gguf")).code == 0


def test_code_in_a_models_folder_never_runs(copy: Copy, tmp_path: Path) -> None:
    folder, marker = copy(), tmp_path / "ran"
    path = folder / "tokenizer_config.json"
    settings = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    (folder / "own.py").write_text(f"open({str(marker)!r}, 'w')\nclass Own: pass\n")
    edit_config(folder, model_file="own.py")
    done = redrafter("chat", "-m", folder, "--max-tokens", 4, stdin=b"y\ny\n")
    assert not marker.exists() and "custom code" not in done.out + done.err
    convert("target", folder, "--out", tmp_path / "out")
    assert not marker.exists() and not (tmp_path / "out" / "own.py").exists()

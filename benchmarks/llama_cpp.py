"""A GGUF here and in llama.cpp: token ids of 200 texts, greedy answers to 20 prompts, and tiny models of every family.

Text is given to both tokenizers with special tokens recognized. Both models get the same ids and answer greedily, in
float32 here; llama.cpp rounds activations to 8 bits on a CPU, so a close choice may fall otherwise: where the first
difference lies, and by how much this model preferred its own token, is in the result. Where rules differ: llama.cpp's
"gpt-4o" and "tekken" leave combining marks out of words, which the models' own tokenizers do not.
Run: python -m benchmarks.llama_cpp FILE.gguf [--llama-python PYTHON] [--families] [--rules] [--out FILE]. PYTHON is
one that has `xllamacpp` (default: this one); without it nothing is compared, which is said. The last line is one JSON
object.
"""

from __future__ import annotations

import redrafter_mlx as rd  # before mlx

# isort: split
import argparse
import json
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx

from redrafter_mlx.files import new_file
from redrafter_mlx.loading.gguf import load_gguf, read_header
from redrafter_mlx.loading.load import load
from redrafter_mlx.measure.machine import machine

from .llama_cpp_texts import PROMPTS, texts

TOKENS = 20
SHOWN = 12
"""Differences that are kept in the result."""


class Absent(Exception):
    """There is no llama.cpp to compare with."""


class LlamaCpp:
    """llama.cpp's server with one file."""

    def __init__(self, address: str) -> None:
        self.address = address

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            self.address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=600) as reply:
            found: dict[str, Any] = json.load(reply)
        return found

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text, special tokens recognized, none added."""
        ids: list[int] = self._post(
            "/tokenize", {"content": text, "add_special": False, "parse_special": True}
        )["tokens"]
        return ids

    def answer(self, ids: list[int], count: int) -> list[int]:
        """The greedy next tokens."""
        body = {
            "prompt": ids, "n_predict": count, "temperature": 0, "top_k": 1, "return_tokens": True,
            "cache_prompt": False,
        }  # fmt: skip
        tokens: list[int] = self._post("/completion", body)["tokens"]
        return tokens[:count]


@contextmanager
def llama_cpp(python: str, path: Path, context: int = 2048) -> Iterator[LlamaCpp]:
    """llama.cpp with the file at `path`, for the time of the block.

    Raises:
        Absent: `python` has no xllamacpp.
        ValueError: llama.cpp does not start.
    """
    script = Path(__file__).with_name("llama_cpp_server.py")
    process = subprocess.Popen(
        [python, str(script), str(path), str(context)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    try:
        said: dict[str, str] = {}
        for line in process.stdout:
            if line.startswith("{"):
                said = json.loads(line)
                break
        if "absent" in said:
            raise Absent(said["absent"])
        if "address" not in said:
            raise ValueError(f"llama.cpp did not load {path}")
        yield LlamaCpp(said["address"])
    finally:
        process.stdin.close()
        process.wait(60)


def compare_tokens(tokenizer: Any, other: LlamaCpp, special: list[str]) -> dict[str, Any]:
    """How many texts have the same ids in both, and what differs."""
    different = []
    given = texts(special)
    for text in given:
        mine, theirs = tokenizer.encode(text, add_special_tokens=False), other.tokenize(text)
        if mine != theirs:
            different.append({"text": text[:80], "here": mine[:40], "llama.cpp": theirs[:40]})
    return {"texts": len(given), "same": len(given) - len(different), "different": different[:SHOWN]}


def compare_answers(model: rd.Model, other: LlamaCpp) -> dict[str, Any]:
    """How many prompts have the same first tokens in both, and how close the choice was where they part."""
    same, apart = 0, []
    assert model.tokenizer is not None
    for prompt in PROMPTS:
        ids = model.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True
        )
        mine = rd.generate(model, ids, max_tokens=TOKENS, draft="off")[1].token_ids
        mine = [token for token in mine if token not in model.eos_token_ids]  # an end comes last
        theirs = [token for token in other.answer(ids, TOKENS) if token not in model.eos_token_ids]
        if mine == theirs:
            same += 1
            continue
        parts = (n for n, (here, there) in enumerate(zip(mine, theirs, strict=False)) if here != there)
        place = next(parts, min(len(mine), len(theirs)))
        logits = model.target.model(mx.array([[*ids, *mine[:place]]]))[0, -1].astype(mx.float32)
        pair = [logits[tokens[place]].item() if place < len(tokens) else "ends" for tokens in (mine, theirs)]
        apart.append({"prompt": prompt, "from token": place, "logits here of both choices": pair})
    return {"prompts": len(PROMPTS), "tokens": TOKENS, "same": same, "apart": apart}


def compare_families(python: str) -> dict[str, Any]:
    """Tiny random models of every architecture: greedy tokens of both from the same ids, float32 weights."""
    from tests import ggufs

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ggufs.CASES:
            path = Path(folder) / f"{name}.gguf"
            ggufs.write(path, name)
            model, _, _ = load_gguf(path)
            try:
                with llama_cpp(python, path, 256) as other:
                    found[name] = _same_tokens(model, other)
            except ValueError as error:
                found[name] = str(error).replace(folder, "")
            print(name, found[name], file=sys.stderr)
    return found


def _same_tokens(model: Any, other: LlamaCpp) -> dict[str, Any]:
    """Of llama.cpp's tokens after three prompts, how many are this model's best, and the worst logit missed by."""
    total = best = 0
    worst = 0.0
    for seed in range(3):
        ids = [(seed * 37 + 11 * place) % 250 + 5 for place in range(12)]
        tokens = other.answer(ids, 16)
        logits = model(mx.array([[*ids, *tokens]]))[0].astype(mx.float32)
        for place, token in enumerate(tokens):
            row = logits[len(ids) - 1 + place]
            total += 1
            best += int(mx.argmax(row).item() == token)
            worst = max(worst, float(mx.max(row) - row[token]))
    return {"tokens": total, "best here too": best, "largest difference of logits": round(worst, 4)}


def compare_rules(python: str, path: Path) -> dict[str, Any]:
    """Every rule by which a byte-level tokenizer cuts text, with the vocabulary of the file at `path`; and
    SentencePiece with a vocabulary that is trained here."""
    from redrafter_mlx.loading.gguf.pretokenizers import RULES

    meta = {key: value for key, value in read_header(path).metadata.items() if key.startswith("tokenizer.")}
    keys = ("model", "pre", "tokens", "token_type", "merges", "eos_token_id")
    meta = {key: meta[key] for key in (f"tokenizer.ggml.{name}" for name in keys)}
    found = {}
    for rule in RULES:
        found[rule] = _compare_tokenizer(python, {**meta, "tokenizer.ggml.pre": rule})
        print(rule, _same(found[rule]), file=sys.stderr)
    for prefix in (True, False):
        name = f"SentencePiece {'with' if prefix else 'without'} the leading space"
        found[name] = _compare_tokenizer(python, sentencepiece(prefix))
        print(name, _same(found[name]), file=sys.stderr)
    return found


def _same(found: dict[str, Any]) -> Any:
    return found.get("same", found)


def _compare_tokenizer(python: str, meta: dict[str, Any]) -> dict[str, Any]:
    """Texts through a tokenizer of this metadata, in a tiny model that llama.cpp loads too."""
    import gguf

    from redrafter_mlx.loading.gguf.tokenizer import load_tokenizer
    from tests import ggufs

    def write(writer: gguf.GGUFWriter) -> int:
        for key, value in meta.items():
            add: dict[type, Any] = {
                str: writer.add_string, list: writer.add_array, bool: writer.add_bool, int: writer.add_uint32,
            }  # fmt: skip
            add[type(value)](key, value)
        return len(meta["tokenizer.ggml.tokens"])

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.gguf"
        ggufs.write(path, "llama-tied", tokenizer=write)
        try:
            with llama_cpp(python, path, 64) as other:
                return compare_tokens(load_tokenizer(meta, path), other, _special(meta))
        except ValueError:
            return {"not known": "llama.cpp does not load a file with this rule"}


def sentencepiece(prefix: bool) -> dict[str, Any]:
    """The metadata of a SentencePiece BPE vocabulary with bytes, trained on the texts."""
    import sentencepiece as spm

    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.txt"
        lines = (line for text in texts([], 120) for line in text.splitlines() if line.strip())
        corpus.write_text("\n".join([*lines, *PROMPTS]), encoding="utf-8")
        spm.SentencePieceTrainer.train(
            input=str(corpus), model_prefix=f"{folder}/m", vocab_size=1200, model_type="bpe", byte_fallback=True,
            character_coverage=0.98, normalization_rule_name="identity", remove_extra_whitespaces=False,
            add_dummy_prefix=prefix, minloglevel=2, user_defined_symbols=["<start>", "\n\n"],
            hard_vocab_limit=False, allow_whitespace_only_pieces=True,
        )  # fmt: skip
        model = spm.SentencePieceProcessor(model_file=f"{folder}/m.model")
    ids = range(model.get_piece_size())
    kinds = [
        2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else
        4 if model.id_to_piece(i) in ("<start>", "\n\n") else 1
        for i in ids
    ]  # fmt: skip
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [model.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [model.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": model.bos_id(),
        "tokenizer.ggml.eos_token_id": model.eos_id(),
        "tokenizer.ggml.unknown_token_id": model.unk_id(),
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_space_prefix": prefix,
    }


def _special(meta: dict[str, Any]) -> list[str]:
    tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    return [token for token, kind in zip(tokens, types, strict=True) if kind in (3, 4)][:16]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("file", type=Path, help="the GGUF")
    parser.add_argument("--llama-python", default=sys.executable, help="a Python that has xllamacpp")
    parser.add_argument("--families", action="store_true", help="tiny models of every architecture, too")
    parser.add_argument("--rules", action="store_true", help="every rule that cuts text, too")
    parser.add_argument("--out", type=Path, help="where to write the result")
    given = parser.parse_args(arguments)
    try:
        with llama_cpp(given.llama_python, given.file) as other:
            model = load(given.file, "none")
            special = _special(read_header(given.file).metadata)
            result = {
                "file": given.file.name,
                "machine": machine(),
                "tokenizer": compare_tokens(model.tokenizer, other, special),
                "answers": compare_answers(model, other),
            }
        if given.families:
            result["families"] = compare_families(given.llama_python)
        if given.rules:
            result["rules"] = compare_rules(given.llama_python, given.file)
    except Absent as reason:
        print(
            f"skipped: {given.llama_python} has no xllamacpp ({reason}); name one that has by --llama-python"
        )
        return 0
    if given.out is not None:
        with new_file(given.out) as part:
            part.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(result, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())

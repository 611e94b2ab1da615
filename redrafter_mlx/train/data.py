"""Self-distillation data: shards of text that the target generated, with the contexts it chose the tokens in.

A shard is two files. `shard-00000.contexts.npy` (n, C) float16: the target's context (final-norm hidden state, then any
`context_layers`) when it chose a token. `shard-00000.npz`: `tokens` (n,) int32, the token chosen in each context;
`starts` (rows + 1,) int64, where each answer begins; `temperatures` (rows,); `prompts` (rows,) text. The .npz is saved
last and under a temporary name, so a shard without it does not exist. A shard depends on nothing but the recipe, its
index and the shards before it: an interrupted run continues where it stopped, with the same result.
"""

from __future__ import annotations

import json
import logging
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from redrafter_mlx.files import new_file, read_json
from redrafter_mlx.target import Target

from .generate import Answer, Row, generate_batch
from .prompts import ChatFormat, Messages, PromptFilter, self_prompts, tokenize, user_text

_log = logging.getLogger("redrafter_mlx")

RECIPE = "recipe.json"
FORWARD_TOKENS = 4096  # in a forward that only computes contexts
Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the text is generated. Kept beside the shards; a run with another recipe is refused."""

    target: str
    """Name of the target."""
    context_layers: tuple[int, ...] = ()
    rows: int = 96
    """Answers generated at the same time, and in a shard."""
    max_tokens: int = 160
    """Maximum tokens per answer."""
    greedy: float = 0.6
    """Share of answers at temperature 0; the temperature of the others is drawn from `temperatures`."""
    temperatures: tuple[float, ...] = (0.6, 0.8, 1.0)
    seed: int = 0
    prompts: str = "self"
    """"self", or a fingerprint of the prompts or the text given."""

    def __post_init__(self) -> None:
        for name in ("rows", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.greedy <= 1:
            raise ValueError(f"greedy must be between 0 and 1, not {self.greedy}")
        if not all(t > 0 for t in self.temperatures):
            raise ValueError(f"temperatures must be positive, not {self.temperatures}")


def shard_path(folder: Path, index: int) -> Path:
    return folder / f"shard-{index:05d}.npz"


def contexts_path(shard: Path) -> Path:
    return shard.with_suffix(".contexts.npy")


def save_shard(
    shard: Path, prompts: Sequence[str], temperatures: Sequence[float], answers: Sequence[Answer]
) -> int:
    """Save one shard; returns its number of tokens."""
    starts = np.cumsum([0, *(len(a.tokens) for a in answers)], dtype=np.int64)
    contexts = np.stack([c for a in answers for c in a.contexts]).astype(np.float16)
    with new_file(contexts_path(shard)) as path, path.open("wb") as file:
        np.save(file, contexts)
    with new_file(shard) as path, path.open("wb") as file:
        np.savez(
            file,
            tokens=np.concatenate([a.tokens for a in answers]).astype(np.int32),
            starts=starts,
            temperatures=np.array(temperatures, dtype=np.float32),
            prompts=np.array(list(prompts), dtype=np.str_),
        )
    return int(starts[-1])


def list_shards(folder: Path) -> list[Path]:
    """The complete shards of a folder, in order."""
    return sorted(p for p in folder.glob("shard-*.npz") if contexts_path(p).is_file())


@dataclass(frozen=True, slots=True)
class Text:
    """Answers without their contexts: small enough to keep, and the contexts can be computed again.

    Its file holds `tokens` (n,), `lengths` and `temperatures` (rows,), and `prompts` in UTF-8, separated by zero bytes.
    """

    prompts: list[str]
    """One turn of a user each."""
    temperatures: list[float]
    answers: list[list[int]]

    @classmethod
    def load(cls, path: Path) -> Text:
        """Read a file that `save` wrote.

        Raises:
            FileNotFoundError, ValueError: no such file, or one that is damaged or of another kind.
        """
        if not path.is_file():
            raise FileNotFoundError(f"--text: no file {path}")
        try:
            with np.load(path) as data:
                prompts = bytes(data["prompts"]).decode().split("\0")
                temperatures, lengths = data["temperatures"].astype(np.float32).tolist(), data["lengths"]
                answers = np.split(data["tokens"].astype(np.int32), np.cumsum(lengths)[:-1])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"--text: {path} does not hold answers, or is cut short: {error}") from None
        if not len(prompts) == len(temperatures) == len(answers):
            raise ValueError(
                f"--text: {path} must have as many prompts as temperatures and answers, "
                f"not {len(prompts)}, {len(temperatures)} and {len(answers)}"
            )
        return cls(prompts, temperatures, [answer.tolist() for answer in answers])

    @classmethod
    def of(cls, folder: Path) -> Text:
        """The text of a folder of shards."""
        text = cls([], [], [])
        for path in list_shards(folder):
            with np.load(path) as data:
                text.prompts.extend(map(str, data["prompts"]))
                text.temperatures.extend(data["temperatures"].tolist())
                text.answers.extend(a.tolist() for a in np.split(data["tokens"], data["starts"][1:-1]))
        return text

    def save(self, path: Path) -> None:
        with new_file(path) as part, part.open("wb") as file:
            np.savez_compressed(
                file,
                tokens=np.concatenate(self.answers).astype(np.int32),
                lengths=np.array([len(answer) for answer in self.answers], dtype=np.int32),
                temperatures=np.array(self.temperatures, dtype=np.float16),
                prompts=np.frombuffer("\0".join(self.prompts).encode(), dtype=np.uint8),
            )


def states(
    target: Target,
    prompts: Sequence[list[int]],
    answers: Sequence[list[int]],
    on_step: Progress | None = None,
) -> list[Answer]:
    """Compute the contexts in which the target would have chosen the tokens of these answers, in large batches.

    The rows of a batch have similar lengths and are padded behind their end, which a causal model does not see.
    """
    lengths = [len(p) + len(a) for p, a in zip(prompts, answers, strict=True)]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    out = [Answer()] * len(order)
    while order:
        longest = lengths[order[-1]]
        count = max(1, FORWARD_TOKENS // longest)
        order, chosen = order[:-count], order[-count:]
        rows = np.zeros((len(chosen), longest), dtype=np.int32)
        for row, index in zip(rows, chosen, strict=True):
            row[: lengths[index]] = prompts[index] + answers[index]
        contexts = np.array(target.contexts(mx.array(rows)).astype(mx.float16))
        for context, index in zip(contexts, chosen, strict=True):
            begin = len(prompts[index]) - 1  # the state before an answer's first token is its prompt's last
            own = context[begin : begin + len(answers[index])]
            out[index] = Answer(list(answers[index]), list(own))
        if on_step is not None:
            on_step(sum(len(answers[index]) for index in chosen))
    return out


class Generator:
    """Fills a folder with shards of text.

    Args:
        target: the model as it will be used; it is set to watch the recipe's `context_layers`.
        folder: where the shards are or will be.
        excluded: prompts that must not be trained on.
        budget: bytes of contexts on the disk from which on no further shard is written; None: no limit.

    Raises:
        ValueError: the folder holds shards of another recipe; the target has no chat template.
    """

    def __init__(
        self,
        target: Target,
        tokenizer: Any,
        folder: Path,
        recipe: Recipe,
        excluded: Sequence[str] = (),
        budget: float | None = None,
    ) -> None:
        self.target, self.tokenizer, self.folder, self.recipe = target, tokenizer, folder, recipe
        self.budget = budget
        self.filter = PromptFilter(excluded)
        self.stop = frozenset(tokenizer.eos_token_ids)
        if recipe.prompts == "self":
            ChatFormat.of(tokenizer)
        target.watch(recipe.context_layers)
        folder.mkdir(parents=True, exist_ok=True)
        self._check_recipe()

    def _check_recipe(self) -> None:
        path = self.folder / RECIPE
        mine = json.loads(json.dumps(asdict(self.recipe)))
        if path.is_file():
            theirs = read_json(path)
            differing = [k for k in mine if mine[k] != theirs.get(k)]
            if differing:
                listed = ", ".join(f"{k} {theirs.get(k)!r} there, {mine[k]!r} now" for k in differing)
                raise ValueError(f"{self.folder} holds data of another recipe: {listed}; use another folder")
            return
        with new_file(path) as part:
            part.write_text(json.dumps(mine, indent=2) + "\n")

    def run(self, num_answers: int, prompts: Sequence[Messages] = (), on_step: Progress | None = None) -> int:
        """Generate shards until there are `num_answers` answers or `prompts`, if given, are used up. Returns the number
        of tokens in all shards.
        """
        shards, rows, total = 0, self.recipe.rows, 0
        texts = iter(prompts)
        while num_answers > 0:
            shard = shard_path(self.folder, shards)
            rng = np.random.default_rng([self.recipe.seed, shards])
            wanted = min(rows, num_answers)
            if shard in list_shards(self.folder):
                with np.load(shard) as data:
                    done = list(data["prompts"])
                    total += int(data["starts"][-1])
                if prompts:
                    self._take(texts, wanted)
                else:
                    for text in done:
                        self.filter.accepts(str(text))
            else:
                batch = []
                if self._has_room():
                    batch = self._take(texts, wanted) if prompts else self._invent(wanted, rng)
                if not batch:
                    break
                total += self._answer(shard, batch, rng, on_step)
            shards, num_answers = shards + 1, num_answers - wanted
        return total

    def run_text(self, text: Text, on_step: Progress | None = None) -> int:
        """Save shards of answers that the target generated before; only their contexts are computed. A prompt may have
        several answers, if they differ. Returns the number of tokens in all shards.
        """
        pairs = [(prompt, tuple(answer)) for prompt, answer in zip(text.prompts, text.answers, strict=True)]
        first: dict[tuple[str, tuple[int, ...]], int] = {}
        for index, pair in enumerate(pairs):
            first.setdefault(pair, index)
        kept = [index for (prompt, _), index in first.items() if not self.filter.excludes(prompt)]
        total = 0
        for shard, begin in enumerate(range(0, len(kept), self.recipe.rows)):
            path = shard_path(self.folder, shard)
            rows = kept[begin : begin + self.recipe.rows]
            there = path in list_shards(self.folder)
            if not there and not self._has_room():
                break
            total += sum(len(text.answers[i]) for i in rows)
            if there:
                continue
            prompts = [text.prompts[i] for i in rows]
            asked = [tokenize(self.tokenizer, [{"role": "user", "content": prompt}]) for prompt in prompts]
            written = states(self.target, asked, [text.answers[i] for i in rows], on_step)
            save_shard(path, prompts, [text.temperatures[i] for i in rows], written)
        return total

    def _has_room(self) -> bool:
        """False, with a warning, once the contexts on the disk have reached the budget."""
        if self.budget is None:
            return True
        used = sum(contexts_path(shard).stat().st_size for shard in list_shards(self.folder))
        if used < self.budget:
            return True
        _log.warning(
            "%s holds %.2f GB of states, the budget is %.2f GB: training on what is there",
            self.folder, used / 1e9, self.budget / 1e9,
        )  # fmt: skip
        return False

    def _take(self, prompts: Any, count: int) -> list[Messages]:
        taken: list[Messages] = []
        while len(taken) < count and (messages := next(prompts, None)) is not None:
            if self.filter.accepts(user_text(messages)):
                taken.append(messages)
        return taken

    def _invent(self, count: int, rng: np.random.Generator) -> list[Messages]:
        """Have the target write prompts; fewer than `count` if it repeats itself."""
        texts: list[str] = []
        for _ in range(4):
            if len(texts) >= count:
                break
            asked = self_prompts(self.target, self.tokenizer, count + count // 4, rng)
            for text in asked:  # unused ones are not remembered: a resumed run knows those written only
                if len(texts) < count and self.filter.accepts(text):
                    texts.append(text)
        return [[{"role": "user", "content": text}] for text in texts]

    def _answer(
        self,
        shard: Path,
        batch: Sequence[Messages],
        rng: np.random.Generator,
        on_step: Progress | None,
    ) -> int:
        recipe = self.recipe
        drawn = [
            0.0 if rng.random() < recipe.greedy else float(rng.choice(recipe.temperatures)) for _ in batch
        ]
        rows = [
            Row(tuple(tokenize(self.tokenizer, messages)), recipe.max_tokens, temperature)
            for messages, temperature in zip(batch, drawn, strict=True)
        ]
        answers = generate_batch(self.target, rows, self.stop, rng, on_step=on_step)
        return save_shard(shard, [user_text(m) for m in batch], drawn, answers)

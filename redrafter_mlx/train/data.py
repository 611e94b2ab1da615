"""Self-distillation data: fills a folder with shards of text that the target writes, questions included.

A shard depends on nothing but the recipe, its index and the shards before it: an interrupted run continues where it
stopped, with the same result (up to how two orders of summation round). While a shard is being written, journals keep
what there is of it (`begun-00000-questions-0.npz`, `begun-00000-answers.npz`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from redrafter_mlx.target import Target

from .generate import Control, Row, generate_batch, is_greedy, states
from .journal import Journal
from .prompts import ChatFormat, Messages, PromptFilter, self_prompts, tokenize, user_text
from .recipe import Recipe
from .rows import Answer
from .shards import SavedAnswers, ShardText, contexts_path, list_shards, read_shard, save_shard, shard_path
from .tally import Tally

_log = logging.getLogger("redrafter_mlx")

ROUNDS = 4
"""How often a target is asked for the questions of one shard, if too few of them can be used."""
LOW_YIELD = 0.5
"""Share of usable questions below which it is faster to give prompts."""


def _ignore(_: Tally) -> None:
    pass


def _never(_: Tally) -> bool:
    return False


@dataclass(frozen=True, slots=True)
class Watch:
    """How the writing is watched and ended."""

    on_step: Callable[[Tally], None] = _ignore
    """Called after every step."""
    is_over: Callable[[Tally], bool] = _never
    """Asked after every step: True ends the writing there, and what there is is kept."""


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
        self._hinted = False
        if recipe.prompts == "self":
            ChatFormat.of(tokenizer)
        target.watch(recipe.context_layers)
        recipe.claim(folder)

    def run(
        self, num_answers: int | None, prompts: Sequence[Messages] = (), watch: Watch | None = None
    ) -> list[Path]:
        """Write shards until there are `num_answers` answers (None: until `watch` ends it) or `prompts`, if given, are
        used up. Returns the shards that make up so many answers; they are used whole.
        """
        watch = watch or Watch()
        tally = Tally(num_answers, self.recipe.max_tokens, asks=not prompts)
        used: list[Path] = []
        texts = iter(prompts)
        while num_answers is None or tally.saved_answers < num_answers:
            path = shard_path(self.folder, len(used))
            there = self._existing(path)
            if there is not None:
                for text in there.prompts:
                    self.filter.accepts(text)
                tally.save(len(there.prompts), len(there.tokens))
            elif watch.is_over(tally) or not self._has_room():
                break
            else:
                rng = np.random.default_rng([self.recipe.seed, len(used)])
                rows = self.recipe.rows
                wanted = rows if num_answers is None else min(rows, num_answers - tally.saved_answers)
                batch = (
                    self._take(texts, wanted) if prompts else self._invent(path, wanted, rng, tally, watch)
                )
                if not batch or not self._answer(path, batch, rng, tally, watch):
                    break
            used.append(path)
            watch.on_step(tally)
        return used

    def run_text(self, text: SavedAnswers, watch: Watch | None = None) -> list[Path]:
        """Save shards of answers that the target generated before; only their contexts are computed. A prompt may have
        several answers, if they differ. Returns the shards.
        """
        watch = watch or Watch()
        kept = self._distinct(text)
        tally = Tally(len(kept), self.recipe.max_tokens, asks=False)
        used: list[Path] = []
        for begin in range(0, len(kept), self.recipe.rows):
            path = shard_path(self.folder, len(used))
            rows = kept[begin : begin + self.recipe.rows]
            answers = [text.tokens[i] for i in rows]
            if self._existing(path) is None:
                if watch.is_over(tally) or not self._has_room():
                    break
                prompts = [text.prompts[i] for i in rows]
                asked = [self._before(text, i) for i in rows]
                tally.begin("states", len(rows))
                control = _control(tally, watch)
                written = states(self.target, asked, answers, control.on_step)
                temperatures = [text.temperatures[i] for i in rows]
                save_shard(path, prompts, self._known(temperatures, written), written)
            tally.save(len(rows), sum(map(len, answers)))
            used.append(path)
            watch.on_step(tally)
        return used

    def _before(self, text: SavedAnswers, index: int) -> list[int]:
        """The tokens before an answer."""
        if text.asked is not None:
            return text.asked[index]
        return tokenize(self.tokenizer, [{"role": "user", "content": text.prompts[index]}])

    def _known(self, temperatures: Sequence[float], answers: Sequence[Answer]) -> list[float]:
        """The temperatures, those that are not known being 0 where every token was the most likely one, else 1."""
        if not any(map(math.isnan, temperatures)):
            return list(temperatures)
        rows = self.target.output_rows()
        return [
            (0.0 if is_greedy(answer, rows) else 1.0) if math.isnan(temperature) else temperature
            for temperature, answer in zip(temperatures, answers, strict=True)
        ]

    def _distinct(self, text: SavedAnswers) -> list[int]:
        """Which answers to use: the first of equal ones, and none to an excluded prompt."""
        first: dict[tuple[str, tuple[int, ...]], int] = {}
        for index, (prompt, answer) in enumerate(zip(text.prompts, text.tokens, strict=True)):
            if answer:
                first.setdefault((prompt, tuple(answer)), index)
        return [index for (prompt, _), index in first.items() if not self.filter.excludes(prompt)]

    def _existing(self, path: Path) -> ShardText | None:
        """The text of a shard that is there and whole; a damaged one is removed, with a warning."""
        if path not in list_shards(self.folder):
            return None
        try:
            return read_shard(path)[0]
        except ValueError as error:
            _log.warning("%s; doing so", error)
            path.unlink()
            contexts_path(path).unlink(missing_ok=True)
            return None

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

    def _take(self, prompts: Iterable[Messages], count: int) -> list[Messages]:
        """The next `count` prompts that can be used; what is too long for the target is left out, with a warning."""
        taken: list[Messages] = []
        most = self.target.max_length
        for messages in prompts:
            if not self.filter.accepts(user_text(messages)):
                continue
            length = len(tokenize(self.tokenizer, messages)) + self.recipe.max_tokens
            if most is not None and length > most:
                _log.warning(
                    "left out: a prompt that with its answer may have %d tokens, more than the %d that %s is made for",
                    length, most, self.target.name,
                )  # fmt: skip
                continue
            taken.append(messages)
            if len(taken) == count:
                break
        return taken

    def _invent(
        self, shard: Path, count: int, rng: np.random.Generator, tally: Tally, watch: Watch
    ) -> list[Messages]:
        """Have the target write `count` prompts; fewer if most of them cannot be used, or time is up."""
        texts: list[str] = []
        asking = count + count // 4
        for number in range(ROUNDS):
            tally.begin("questions", asking)
            control = _control(tally, watch, _journal(shard, f"questions-{number}"))
            asked = self_prompts(self.target, self.tokenizer, asking, rng, control)
            before = len(texts)
            for text in asked:  # unused ones are not remembered: a resumed run knows those written only
                if len(texts) < count and self.filter.accepts(text):
                    texts.append(text)
            usable = len(texts) - before
            tally.end_questions(usable)
            missing = count - len(texts)
            if not missing or watch.is_over(tally):
                break
            share = max(usable / asking, 0.25)
            asking = min(count + count // 4, int(1.25 * missing / share) + 1)
        self._hint(tally)
        return [[{"role": "user", "content": text}] for text in texts]

    def _hint(self, tally: Tally) -> None:
        """Say once that a target asks badly."""
        asked, usable = tally.finished_questions, tally.usable_questions
        if not self._hinted and usable < LOW_YIELD * asked:
            self._hinted = True
            _log.warning(
                "%s asks badly: of %d questions %d can be used. With --prompts FILE no time goes into questions",
                self.target.name, asked, usable,
            )  # fmt: skip

    def _answer(
        self,
        shard: Path,
        batch: Sequence[Messages],
        rng: np.random.Generator,
        tally: Tally,
        watch: Watch,
    ) -> bool:
        """Have the target answer, and save the shard. False if no answer has a token, time being up."""
        recipe = self.recipe
        drawn = [
            0.0 if rng.random() < recipe.greedy else float(rng.choice(recipe.temperatures)) for _ in batch
        ]
        rows = [
            Row(tuple(tokenize(self.tokenizer, messages)), recipe.max_tokens, temperature)
            for messages, temperature in zip(batch, drawn, strict=True)
        ]
        tally.begin("answers", len(rows))
        control = _control(tally, watch, _journal(shard, "answers"))
        answers = generate_batch(self.target, rows, self.stop, rng, control=control)
        kept = [i for i, answer in enumerate(answers) if answer.tokens]
        if not kept:
            return False
        prompts = [user_text(batch[i]) for i in kept]
        tokens = save_shard(shard, prompts, [drawn[i] for i in kept], [answers[i] for i in kept])
        tally.save(len(kept), tokens)
        for journal in shard.parent.glob(f"{_begun(shard)}-*.npz"):
            journal.unlink()
        return True


def _begun(shard: Path) -> str:
    """How the names of a shard's journals begin."""
    return shard.stem.replace("shard", "begun")


def _journal(shard: Path, what: str) -> Journal:
    return Journal(shard.with_name(f"{_begun(shard)}-{what}.npz"))


def _control(tally: Tally, watch: Watch, journal: Journal | None = None) -> Control:
    """A batch's control that counts its steps in the tally."""

    def on_step(tokens: int, ended: int) -> None:
        tally.step(tokens, ended)
        watch.on_step(tally)

    return Control(on_step, lambda: watch.is_over(tally), journal)

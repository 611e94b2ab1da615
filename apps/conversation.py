"""A conversation that keeps its KV cache: what `redrafter chat` does, without a terminal."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace

from redrafter_mlx.generation import Chunk, Model, Options, PromptCache, encode, make_policy, start
from redrafter_mlx.prompts import encode_text, render, user
from redrafter_mlx.stats import Stats


@dataclass(frozen=True, slots=True)
class _Answered:
    """The last turn: the prompt it was given and the token ids it said."""

    text: str
    """rendered prompt"""
    said: str
    tokens: list[int]
    """of prompt and answer, without the end token"""


@dataclass(slots=True)
class Conversation:
    """Messages so far and the cache that holds them.

    The next prompt is not the whole history tokenized anew but the tokens of the last turn, as they
    were, and the rest of the chat template: text that a model wrote need not tokenize to the ids it
    wrote, and the cache would end at the first difference.
    """

    model: Model
    settings: Options
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)
    cache: PromptCache = field(default_factory=PromptCache)
    last: Stats | None = None
    dropped: int = 0
    """exchanges forgotten for the last turn, because the context was full"""
    _answered: _Answered | None = None
    _before: _Answered | None = None
    """what `_answered` was before the last exchange"""

    def __post_init__(self) -> None:
        tokenizer = self.model.tokenizer
        if tokenizer is None or not tokenizer.has_chat_template:
            raise ValueError(f"{self.model.target.name} has no chat template, so it cannot chat")
        make_policy(self.model, self.settings.draft)  # a mistake there shows before the first turn

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages.clear()
        self.last, self._answered, self._before = None, None, None

    def undo(self) -> str:
        """Forget the last exchange; returns what the user said in it.

        Raises:
            ValueError: there is none.
        """
        if not self.messages:
            raise ValueError("nothing was said yet")
        self._answered, self._before = self._before, None
        *self.messages[:], asked, _ = self.messages
        return asked["content"]

    def change(self, settings: Options) -> None:
        """Use other settings from the next turn on.

        Raises:
            ValueError: the model cannot follow them; nothing changes.
        """
        make_policy(self.model, settings.draft, settings.sampling.is_greedy)
        self.settings = settings

    def check_system(self, system: str | None) -> None:
        """Check a system message before it is set.

        Raises:
            ValueError: the chat template refuses it.
        """
        assert self.model.tokenizer is not None
        if system is not None:
            render(self.model.tokenizer, [{"role": "system", "content": system}, user("hi")])

    def say(self, text: str) -> Generator[Chunk, None, None]:
        """The answer to `text`. What was said stays in the history, also where the caller stops.

        Raises:
            ValueError: `text` alone is more than the context holds; the conversation is as before.
        """
        before = list(self.messages)
        self.messages.append(user(text))
        try:
            prompt, room = self._fit()
            settings = replace(self.settings, max_tokens=room)
            stream = start(self.model, prompt, settings, self.cache)
        except ValueError:
            self.messages[:] = before
            raise
        return self._answer(stream, prompt, before)

    def _answer(
        self, stream: Iterator[Chunk], prompt: list[int], before: list[dict[str, str]]
    ) -> Generator[Chunk, None, None]:
        rendered, said = self._render(), ""
        stats: Stats | None = None
        try:
            for chunk in stream:
                said, stats = said + chunk.text, chunk.stats
                yield chunk
        finally:
            stream.close()  # type: ignore[attr-defined]  # the cache then holds what was said
            if stats is None:
                self.messages[:] = before
            else:
                self.messages.append({"role": "assistant", "content": said})
                ends = self.model.tokenizer.eos_token_ids if self.model.tokenizer else set()
                ids = [token for token in stats.token_ids if token not in ends]
                self._before = self._answered
                self._answered = _Answered(rendered, said, [*prompt, *ids])
                self.last = stats

    def _fit(self) -> tuple[list[int], int]:
        """The prompt and how long the answer may be; the oldest exchanges go where they must."""
        limit, wanted = self.model.target.max_length, self.settings.max_tokens
        self.dropped = 0
        prompt = self._tokens()
        if limit is None:
            return prompt, wanted
        reserve = min(wanted, limit // 4)
        if len(prompt) + reserve <= limit:
            return prompt, min(wanted, limit - len(prompt))
        # More than must go, so that not every further turn has to process the history anew.
        while len(prompt) + reserve > limit * 3 // 4 and len(self.messages) > 1:
            del self.messages[:2]
            self.dropped += 1
            self._answered = None
            prompt = self._tokens()
        if len(prompt) + 1 > limit:
            raise ValueError(
                f"the message is too long: with the chat template it is {len(prompt)} tokens, and "
                f"{self.model.target.name} has a context of {limit}"
            )
        return prompt, min(wanted, limit - len(prompt))

    def _tokens(self) -> list[int]:
        return self._continued() or encode(self.model, self._with_system())

    def _continued(self) -> list[int] | None:
        """The last turn's tokens and what the template puts behind them; None if it does not."""
        if self._answered is None:
            return None
        assert self.model.tokenizer is not None
        rendered, answer = self._render(), self._answered.said
        for said in (answer, answer.strip()):  # some templates strip it
            start = self._answered.text + said
            if rendered.startswith(start):
                rest = encode_text(self.model.tokenizer, rendered[len(start) :], special=False)
                return [*self._answered.tokens, *rest]
        return None

    def _render(self) -> str:
        assert self.model.tokenizer is not None
        return render(self.model.tokenizer, self._with_system())

    def _with_system(self) -> list[dict[str, str]]:
        if self.system is None:
            return self.messages
        return [{"role": "system", "content": self.system}, *self.messages]

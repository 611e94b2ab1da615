"""The public way to generate text: `stream_generate` and `generate`."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import mlx.core as mx

from .decode import Text, decode, prefill
from .drafters.history import History
from .model import Model as Model
from .model import encode as encode
from .model import make_policy as make_policy
from .policy import Off, Policy
from .prompt_cache import PromptCache as PromptCache
from .prompts import Prompt
from .sampling import Sampling
from .stats import Stats
from .text import TextStream
from .tree import MAX_NODES, Beam

if TYPE_CHECKING:
    pass

_log = logging.getLogger("redrafter_mlx")

RESERVED_TOKENS = 4096  # KV cache allocated at once for an answer; longer ones grow it in blocks


@dataclass(frozen=True, slots=True)
class Chunk:
    """One token of a stream."""

    text: str
    """What became certain with this token; may be empty, or more than one token's text."""
    token: int
    source: str | None
    """What drafted it ("lookup", "recurrent", ...); None where it is the target's own next token."""
    finish_reason: str | None
    """"stop" or "length" with the last token."""
    stats: Stats
    """Of the generation so far; the same object in every chunk."""

    @property
    def from_draft(self) -> bool:
        """True where it is an accepted draft token."""
        return self.source is not None


@dataclass(frozen=True, slots=True)
class Options:
    """How to generate; checked before any work."""

    max_tokens: int = 256
    """Maximum tokens to generate."""
    sampling: Sampling = field(default_factory=Sampling)
    """Greedy by default."""
    draft: str | Beam = "auto"
    """"auto", "off", "WxL" or "WxL@N" (L counts the root, N = rows verified, root included)."""
    stop: tuple[str, ...] = ()
    """The text ends before the first of these strings."""
    raw: bool = False
    """Take a string as it is, without the chat template."""
    kv_bits: int | None = None
    """Quantize the KV cache to this many bits."""

    def __post_init__(self) -> None:
        if not isinstance(self.max_tokens, int) or isinstance(self.max_tokens, bool) or self.max_tokens < 1:
            raise ValueError(f"max_tokens must be an integer, 1 or more, not {self.max_tokens!r}")
        if not isinstance(self.sampling, Sampling):
            raise ValueError(f"sampling must be a Sampling, not {self.sampling!r}")
        if not isinstance(self.draft, (str, Beam)):
            raise ValueError(f"draft must be auto, off, WxL, WxL@N or a Beam, not {self.draft!r}")
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise ValueError(f"stop must be a list of strings that are not empty, not {text!r}")


def stream_generate(  # noqa: PLR0913  (the public options, all but two by keyword)
    model: Model,
    prompt: Prompt,
    *,
    max_tokens: int = 256,
    sampling: Sampling | None = None,
    draft: str | Beam = "auto",
    stop: Sequence[str] | None = (),
    raw: bool = False,
    cache: PromptCache | None = None,
    kv_bits: int | None = None,
) -> Iterator[Chunk]:
    """Generate text, a chunk per token.

    Args:
        prompt: a string (chat template applied unless `raw`), a list of messages, or a list of token ids.
        max_tokens: maximum tokens to generate.
        sampling: greedy by default.
        draft: "auto", "off", "WxL" or "WxL@N" (L counts the root, N = rows verified, root included).
        stop: the text ends before the first of these strings.
        raw: take a string as it is, without the chat template.
        cache: kept between calls, so that a shared prefix is not processed again.
        kv_bits: quantize the KV cache to this many bits.

    Raises:
        ValueError: before any work, for invalid arguments.
    """
    if isinstance(stop, str):
        raise ValueError("stop must be a list of strings, not one string")
    if stop is not None and not isinstance(stop, (list, tuple)):
        raise ValueError(f"stop must be a list of strings, not {stop!r}")
    options = Options(
        max_tokens, Sampling() if sampling is None else sampling, draft, tuple(stop or ()), raw, kv_bits
    )
    return start(model, prompt, options, cache)


def start(
    model: Model, prompt: Prompt, options: Options, cache: PromptCache | None = None
) -> Iterator[Chunk]:
    """`stream_generate` with its options as one value."""
    tokens = encode(model, prompt, options.raw)
    limit = model.target.max_length
    if limit is not None and len(tokens) + options.max_tokens > limit:
        raise ValueError(
            f"prompt ({len(tokens)} tokens) + max_tokens ({options.max_tokens}) is more than the context of "
            f"{limit} tokens that {model.target.name} has"
        )
    if options.stop and model.tokenizer is None:
        raise ValueError(f"stop strings need a tokenizer, and {model.target.name} has none")
    options.sampling.check_vocabulary(model.target.vocab_size)
    policy = make_policy(model, options.draft, options.sampling.is_greedy)
    cache = PromptCache() if cache is None else cache
    cache.check(model.target, options.kv_bits)
    if cache.kv is None:
        with model.lock:  # with `kv_bits` the model runs, to show the size of its heads
            cache.kv = model.target.new_cache(options.kv_bits)
    return _stream(model, tokens, options, policy, cache)


def _stream(
    model: Model, prompt: list[int], options: Options, policy: Policy, cache: PromptCache
) -> Iterator[Chunk]:
    cache.check(model.target, options.kv_bits)  # again: another stream may have begun since
    cache.in_use, cache.target = True, model.target
    drafter = None if isinstance(policy, Off) else model.drafter
    reused = cache.reuse(prompt, drafter)
    with model.lock:
        kv = cache.kv or model.target.new_cache(options.kv_bits)
    kv.reserve(len(prompt) + min(options.max_tokens, RESERVED_TOKENS) + MAX_NODES)
    text = Text(
        model.target, drafter, kv, policy, options.sampling, prompt,
        lookup=model.lookup, max_tokens=options.max_tokens, ends=model.eos_token_ids,
    )  # fmt: skip
    stats = text.stats
    stats.prompt_tokens, stats.reused_tokens = len(prompt), reused
    run = _Run(model, text, TextStream(model.tokenizer, options.stop, prompt), options.max_tokens)
    try:
        with _wired(model):
            yield from run.chunks(prompt[reused:])
    finally:
        said = [*prompt, *stats.token_ids]
        with model.lock:
            cache.store(kv, said)
            if model.lookup is not None and model.lookup.history is not None:
                _remember(model.lookup.history, said)


def _remember(history: History, tokens: list[int]) -> None:
    try:
        history.add(tokens)
    except OSError as error:  # the answer is there all the same
        _log.warning("the text could not be kept in %s: %s", history.path, error)


class _Run:
    """The steps of one stream: timed without the consumer's time, one at a time per model, all in one thread."""

    def __init__(self, model: Model, text: Text, stream: TextStream, max_tokens: int) -> None:
        self._model, self._text, self._stream, self._max_tokens = model, text, stream, max_tokens
        self._thread = threading.get_ident()

    def chunks(self, prompt: list[int]) -> Iterator[Chunk]:
        model, text, stats = self._model, self._text, self._text.stats
        mx.reset_peak_memory()
        begun = time.perf_counter()
        with model.lock:
            first = prefill(model.target, text, prompt)
        stats.prefill_seconds = time.perf_counter() - begun
        yield from self._emit([first])
        steps = decode(model.target, text)
        while stats.finish_reason is None:
            if threading.get_ident() != self._thread:
                raise RuntimeError(
                    "a stream must be read in one thread: the one in which its first chunk was"
                )
            begun = time.perf_counter()
            with model.lock:
                tokens = next(steps)
            stats.decode_seconds += time.perf_counter() - begun
            yield from self._emit(tokens)

    def _emit(self, tokens: list[int]) -> Iterator[Chunk]:
        """A chunk for each token of a step."""
        stats, stream, sources = self._text.stats, self._stream, self._text.sources
        for index, token in enumerate(tokens):
            stats.token_ids.append(token)
            stats.generated_tokens += 1
            piece = "" if token in self._model.eos_token_ids else stream.add(token)
            if token in self._model.eos_token_ids or stream.stopped:
                stats.finish_reason = "stop"
            elif stats.generated_tokens == self._max_tokens:
                stats.finish_reason = "length"
            if stats.finish_reason:
                piece += stream.finish()
                if stream.stopped:  # completed by what the detokenizer had held back
                    stats.finish_reason = "stop"
            stats.peak_memory_bytes = mx.get_peak_memory()
            source = sources[index] if index < len(sources) else None
            yield Chunk(piece, token, source, stats.finish_reason, stats)
            if stats.finish_reason:
                return


def _wired(model: Model) -> AbstractContextManager[None]:
    """On Metal keep the weights resident while a text is decoded, as mlx-lm does."""
    if not mx.metal.is_available():
        return nullcontext()
    from mlx_lm.generate import wired_limit

    return cast(AbstractContextManager[None], wired_limit(model.target.model))


def generate(  # noqa: PLR0913  (as stream_generate)
    model: Model,
    prompt: Prompt,
    *,
    max_tokens: int = 256,
    sampling: Sampling | None = None,
    draft: str | Beam = "auto",
    stop: Sequence[str] | None = (),
    raw: bool = False,
    cache: PromptCache | None = None,
    kv_bits: int | None = None,
) -> tuple[str, Stats]:
    """All of `stream_generate`'s text at once, and its figures. Same arguments and errors."""
    stream = stream_generate(
        model, prompt, max_tokens=max_tokens, sampling=sampling, draft=draft, stop=stop, raw=raw, cache=cache,
        kv_bits=kv_bits,
    )  # fmt: skip
    text, stats = [], Stats()
    for chunk in stream:
        text.append(chunk.text)
        stats = chunk.stats
    return "".join(text), stats

"""The public way to generate text: `stream_generate` and `generate`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .auto import Auto, Experience
from .cache import KVCache
from .cost import cost_table
from .decode import Decoder, Stats
from .drafter import RecurrentDrafter
from .policy import Fixed, Off, Policy
from .sampling import Sampling
from .target import Target
from .text import TextStream
from .tree import MAX_NODES, Beam

RESERVED_TOKENS = 4096  # KV cache allocated at once for an answer; longer ones grow it in blocks

Message = Mapping[str, str]
Prompt = str | Sequence[Message] | Sequence[int]


@dataclass(slots=True)
class Model:
    """What `load` returns: a target, its drafter where there is one, its tokenizer where there is
    one.
    """

    target: Target
    drafter: RecurrentDrafter | None = None
    tokenizer: TokenizerWrapper | None = None
    experience: Experience | None = None
    """what `draft="auto"` has learned about the two on this machine"""


@dataclass(frozen=True, slots=True)
class Chunk:
    """One token of a stream."""

    text: str
    """what became certain with this token; may be empty, or more than one token's text"""
    token: int
    from_draft: bool
    """True where it is an accepted draft token"""
    finish_reason: str | None
    """"stop" or "length" with the last token"""
    stats: Stats
    """of the generation so far; the same object in every chunk"""


@dataclass(slots=True)
class PromptCache:
    """A KV cache that outlives one generation, with the tokens it holds: give it to the next
    turn.
    """

    tokens: list[int] = field(default_factory=list)
    kv: KVCache | None = None

    def reuse(self, prompt: Sequence[int]) -> int:
        """Cut the cache back to the longest prefix it shares with `prompt` and return that prefix's
        length.

        At least one prompt token is left to process: the drafter needs the hidden state of the last
        one.
        """
        if self.kv is None:
            return 0
        shared = 0
        for mine, theirs in zip(self.tokens, prompt[:-1], strict=False):
            if mine != theirs:
                break
            shared += 1
        if not self.kv.can_trim_to(shared):
            self.kv, self.tokens = None, []
            return 0
        self.kv.trim(self.kv.length - shared)
        del self.tokens[shared:]
        return shared


def encode(model: Model, prompt: Prompt, raw: bool = False) -> list[int]:
    """Token ids of a prompt: a string (as a user's message unless `raw`), messages, or token ids.

    Raises:
        ValueError: empty, ids outside the vocabulary, or text without a tokenizer or chat template.
    """
    tokens = _encode(model, prompt, raw)
    if not tokens:
        raise ValueError("the prompt is empty: it needs at least one token")
    worst = max(tokens, key=lambda t: t if t >= 0 else float("inf"))
    if not 0 <= worst < model.target.vocab_size:
        raise ValueError(f"token ids must lie in 0..{model.target.vocab_size - 1}, not {worst}")
    return tokens


def _encode(model: Model, prompt: Prompt, raw: bool) -> list[int]:
    if not isinstance(prompt, str) and all(isinstance(item, int) for item in prompt):
        return [int(item) for item in prompt]  # type: ignore[arg-type]
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ValueError(f"{model.target.name} has no tokenizer: give the prompt as token ids")
    if isinstance(prompt, str) and raw:
        return list(tokenizer.encode(prompt))
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise ValueError(f"a message needs 'role' and 'content', not {message!r}")
    if not tokenizer.has_chat_template:
        if isinstance(prompt, str):
            return list(tokenizer.encode(prompt))
        raise ValueError(f"{model.target.name} has no chat template: give the prompt as a string")
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True))


def make_policy(model: Model, draft: str | Beam, greedy: bool = True) -> Policy:
    """The policy for a `draft` argument: "auto", "off", "WxL", "WxL@N" or a Beam.

    Raises:
        ValueError: none of these, or drafting asked for without a drafter.
    """
    if draft == "off" or (draft == "auto" and model.drafter is None):
        return Off()
    if model.drafter is None:
        raise ValueError(
            f"draft={str(draft)!r} needs a drafter, and {model.target.name} was loaded without one"
        )
    if draft == "auto":
        if model.experience is None:
            model.experience = Experience(cost_table(model.target, model.drafter))
        return Auto(model.experience, greedy, model.drafter.config.draft_vocab)
    beam = draft if isinstance(draft, Beam) else Beam.parse(draft)
    if beam.width > model.drafter.config.draft_vocab:
        raise ValueError(
            f"beam width must be at most the drafter's vocabulary {model.drafter.config.draft_vocab}, "
            f"not {beam.width}"
        )
    return Fixed(beam)


def stream_generate(  # noqa: PLR0913  (the public options, all but two by keyword)
    model: Model,
    prompt: Prompt,
    *,
    max_tokens: int = 256,
    sampling: Sampling | None = None,
    draft: str | Beam = "auto",
    stop: Sequence[str] = (),
    raw: bool = False,
    cache: PromptCache | None = None,
    kv_bits: int | None = None,
) -> Iterator[Chunk]:
    """Generate text, a chunk per token.

    Args:
        prompt: a string (chat template applied unless `raw`), a list of messages, or a list of
            token ids.
        max_tokens: tokens to generate at most.
        sampling: greedy by default.
        draft: "auto", "off", "WxL" or "WxL@N" (L counts the root, N = rows verified, root included).
        stop: the text ends before the first of these strings.
        cache: kept between calls, so that a shared prefix is not processed again.
        kv_bits: quantise the KV cache.

    Raises:
        ValueError: before any work, for arguments that cannot be.
    """
    tokens = encode(model, prompt, raw)
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be 1 or more, not {max_tokens}")
    limit = model.target.max_length
    if limit is not None and len(tokens) + max_tokens > limit:
        raise ValueError(
            f"prompt ({len(tokens)} tokens) + max_tokens ({max_tokens}) is more than the context of {limit} "
            f"tokens that {model.target.name} has"
        )
    if isinstance(stop, str):
        raise ValueError("stop must be a list of strings, not one string")
    if stop and model.tokenizer is None:
        raise ValueError(f"stop strings need a tokenizer, and {model.target.name} has none")
    sampling = sampling or Sampling()
    policy = make_policy(model, draft, sampling.is_greedy)
    cache = cache or PromptCache()
    if cache.kv is None:
        cache.kv = model.target.new_cache(kv_bits)
    elif cache.kv.bits != kv_bits:
        raise ValueError(f"the cache given has kv_bits {cache.kv.bits}, asked for {kv_bits}")
    return _stream(_Job(model, tokens, max_tokens, sampling, policy, tuple(stop), cache))


@dataclass(frozen=True, slots=True)
class _Job:
    """A checked call of `stream_generate`."""

    model: Model
    prompt: list[int]
    max_tokens: int
    sampling: Sampling
    policy: Policy
    stop: tuple[str, ...]
    cache: PromptCache


def _stream(job: _Job) -> Iterator[Chunk]:
    model, prompt, max_tokens, cache = job.model, job.prompt, job.max_tokens, job.cache
    bits = cache.kv.bits if cache.kv is not None else None
    reused = cache.reuse(prompt)
    kv = cache.kv = cache.kv or model.target.new_cache(bits)
    kv.reserve(len(prompt) + min(max_tokens, RESERVED_TOKENS) + MAX_NODES)
    decoder = Decoder(model.target, model.drafter, kv, job.policy, job.sampling)
    decoder.wanted = max_tokens - 1
    stats, text = decoder.stats, TextStream(model.tokenizer, job.stop)
    ends = model.tokenizer.eos_token_ids if model.tokenizer is not None else set()
    stats.prompt_tokens, stats.reused_tokens = len(prompt), reused
    mx.reset_peak_memory()
    started = time.perf_counter()
    try:
        first = decoder.prefill(prompt[reused:], history=prompt[:reused])
        stats.prefill_seconds = time.perf_counter() - started
        started = time.perf_counter()
        for token, from_draft in _tokens(decoder, first):
            stats.token_ids.append(token)
            stats.generated_tokens += 1
            piece = "" if token in ends else text.add(token)
            if token in ends or text.stopped:
                stats.finish_reason = "stop"
            elif stats.generated_tokens == max_tokens:
                stats.finish_reason = "length"
            if stats.finish_reason:
                piece += text.finish()
            stats.decode_seconds = time.perf_counter() - started
            stats.peak_memory_bytes = mx.get_peak_memory()
            yield Chunk(piece, token, from_draft, stats.finish_reason, stats)
            if stats.finish_reason:
                return
    finally:
        _settle(cache, kv, [*prompt, *stats.token_ids])


def _tokens(decoder: Decoder, first: int) -> Iterator[tuple[int, bool]]:
    yield first, False
    for step in decoder.steps():
        for index, token in enumerate(step):
            yield token, index < len(step) - 1


def _settle(cache: PromptCache, kv: KVCache, tokens: list[int]) -> None:
    """Leave the cache with exactly the tokens that were given or emitted, also after an
    interruption.
    """
    surplus = kv.length - len(tokens)
    if surplus > 0 and not kv.can_trim_to(len(tokens)):
        cache.kv, cache.tokens = None, []
        return
    kv.trim(max(0, surplus))
    cache.tokens = tokens[: kv.length]


def generate(model: Model, prompt: Prompt, **options: object) -> tuple[str, Stats]:
    """All of `stream_generate`'s text at once, and what it took. Same arguments."""
    text, stats = [], Stats()
    for chunk in stream_generate(model, prompt, **options):  # type: ignore[arg-type]
        text.append(chunk.text)
        stats = chunk.stats
    return "".join(text), stats

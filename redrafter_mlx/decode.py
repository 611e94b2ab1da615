"""The data path: `step`, and `Text`, the state of one text between two steps.

    tree     the best N nodes of what was drafted, node 0 the root
    verify   one target forward over all N rows
    accept   the target's own token after every node, and the path on which tree and target agree; the draft of the
             next step is queued from the path's last context before the host looks
    commit   the one synchronization: path and next token are read, the path is kept in the KV cache

Everything between two synchronizations is one lazy graph. Plain decoding is the same with a tree of the root alone; its
path is known in advance, so it runs a step ahead of what the host reads.

Letters: N nodes, L beam length counting the root, C context size, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import mlx.core as mx

from .accept import Acceptance, accept
from .drafters.interface import Drafter, RowReader, Rows, Seen, TextDrafter
from .policy import Outcome, Policy
from .sampling import Sampler, Sampling
from .stats import Stats
from .target import Target, Verified
from .target.cache import KVCache
from .tree import Beam, Candidates, TokenTree, build, chain

PREFILL_BLOCK = 2048  # prompt tokens per forward
SHORT_PROMPT = 32  # up to here one forward is cheaper than two


def step(target: Target, texts: Sequence[Text]) -> list[list[int]]:
    """One decode step of every text: the tokens each has gained."""
    trees = [text.tree() for text in texts]
    verified = target.verify_all(trees, [text.cache for text in texts])
    for text, rows in zip(texts, verified, strict=True):
        text.accept(rows)
    return [text.commit() for text in texts]


def decode(target: Target, text: Text) -> Iterator[list[int]]:
    """The tokens of each step, accepted draft tokens first, then the target's next one, to the text's end."""
    while text.needs_step:
        yield step(target, [text])[0]
    yield text.flush()


def begin_text(drafter: Drafter, cache: KVCache, prompt: Sequence[int]) -> TextDrafter:
    """The drafter at work on a text. One that reads all committed rows goes on where it left off with this cache."""
    if not drafter.needs_rows:
        return drafter.start(prompt)
    reader = _reader(drafter, cache)
    if reader is None:
        reader = cast(RowReader, drafter.start(prompt))
        cache.followers.append(reader)
    return reader


def rows_shown(drafter: Drafter | None, cache: KVCache) -> int:
    """Positions of `cache` from which a text with this drafter can go on: those whose rows it has been shown, if it
    reads them. What follows them must be processed again.
    """
    if drafter is None or not drafter.needs_rows:
        return cache.length
    reader = _reader(drafter, cache)
    return 0 if reader is None else min(reader.shown, cache.length)


def _reader(drafter: Drafter, cache: KVCache) -> RowReader | None:
    readers = (each for each in cache.followers if getattr(each, "drafter", None) is drafter)
    return cast("RowReader | None", next(readers, None))


def prefill(target: Target, text: Text, prompt: Sequence[int], block: int = PREFILL_BLOCK) -> int:
    """Process what the cache does not hold of the prompt, in blocks; returns the first token the target chose."""
    tokens = mx.array(list(prompt), dtype=mx.int32)
    # The head would run over every row of a forward whose logits are asked for, so a long prompt's last token goes
    # alone, as in mlx-lm.
    body = len(prompt) - 1 if len(prompt) > SHORT_PROMPT else 0
    for start in range(0, body, block):
        part = tokens[start : min(start + block, body)]
        text.show(target.extend(part, text.cache).run, part)
        mx.eval(text.cache.arrays())
        mx.clear_cache()
    verified = target.extend(tokens[body:], text.cache)
    text.show(verified.run, tokens[body:])
    text.begin(verified)
    first = text.root
    if not text.is_drafting and text.needs_step:  # a plain step runs while the host looks at the first token
        text.accept(target.verify(text.tree(), text.cache))
    return int(first)


@dataclass(frozen=True, slots=True)
class _Draft:
    """A queued draft."""

    beam: Beam
    candidates: Candidates
    noise: mx.array | None
    """(L, V) Gumbel noise of the positions after the root"""
    num_offered: mx.array | None
    """() int32: rows to verify but the root; None where that was decided beforehand"""


class Text:
    """One text being decoded.

    Args:
        drafter: None decodes plainly, whatever the policy says.
        cache: holds `prompt` but for what `prefill` will be given.
        prompt: all tokens before the first one that is chosen.
        max_tokens: the text ends after so many; None: never.
        ends: tokens that end the text, also within an accepted path.
    """

    def __init__(  # noqa: PLR0913  (two by keyword)
        self,
        target: Target,
        drafter: Drafter | None,
        cache: KVCache,
        policy: Policy,
        sampling: Sampling,
        prompt: Sequence[int],
        *,
        max_tokens: int | None = None,
        ends: frozenset[int] = frozenset(),
    ) -> None:
        self.cache, self.policy = cache, policy
        self.sampler = Sampler(sampling, target.vocab_size, prompt)
        self.stats = Stats(seed=self.sampler.sampling.seed)
        self.root = mx.array(0)
        """() int32: chosen by the target, not yet processed"""
        self.context = mx.zeros((0,))
        """(C,) of the last committed token"""
        self.num_accepted = 0
        """draft tokens among those of the last step"""
        self._drafter = None if drafter is None else begin_text(drafter, cache, prompt)
        self._reader = cast(RowReader, self._drafter) if drafter is not None and drafter.needs_rows else None
        self._ends = ends
        self._remaining = float("inf") if max_tokens is None else max_tokens - 1  # after the first
        self._draft: _Draft | None = None  # for the next step
        self._tree = chain(mx.zeros((1,), dtype=mx.int32))  # of the step under way
        self._drafted: _Draft | None = None  # what that tree was built from
        self._found: Acceptance | None = None
        self._unread: list[mx.array] = []  # tokens (1,) of plain steps that the host has not read
        self._begun = 0.0

    @property
    def needs_step(self) -> bool:
        """False once all tokens that are wanted have been read, or will be by `flush`."""
        return self._remaining > len(self._unread)

    @property
    def is_drafting(self) -> bool:
        """True where a draft is queued for the next step."""
        return self._draft is not None

    @property
    def draft_output(self) -> list[mx.array]:
        """What to evaluate to have the queued draft computed."""
        return [] if self._draft is None else [self._draft.candidates.tokens, self._draft.candidates.logprobs]

    @property
    def output(self) -> list[mx.array]:
        """What `commit` will read of the step under way."""
        return self._unread[-1:] if self._found is None else [self._found.summary]

    def begin(self, verified: Verified) -> None:
        """Choose the first token from the prompt's last row (1, ...) and queue a draft."""
        position = self.cache.length
        noise = self.sampler.noise(mx.array([position], dtype=mx.int32), position, 1)
        self.root, self.context = self.sampler.first(verified.logits, noise)[0], verified.contexts[0]
        self.queue_draft(mx.array(position, dtype=mx.int32), position)

    def tree(self) -> TokenTree:
        """The nodes to verify in this step: the best of the queued draft, or the root alone."""
        self._begun, draft = time.perf_counter(), self._draft
        self._drafted, self._draft, self._found = draft, None, None
        if draft is None:
            self._tree = chain(self.root.reshape(1))
        else:
            most = draft.candidates.num_candidates + 1
            nodes = min(draft.beam.nodes or most, most)
            if draft.num_offered is not None:
                nodes = 1 + cast(int, draft.num_offered.item())  # known since the last synchronization
            self._tree = build(draft.candidates, self.root, nodes)
        return self._tree

    def accept(self, verified: Verified) -> None:
        """Choose the target's tokens, find the path, and queue the draft of the next step."""
        if self._drafted is None:
            position = self.cache.length + 1
            noise = self.sampler.noise(mx.array([position], dtype=mx.int32), position, 1)
            token = self.sampler.choose(verified.logits, self._tree, noise)
            self.sampler.commit(self._tree.tokens)
            self.cache.commit(1)
            self.root, self.context = token[0], verified.contexts[0]
            mx.async_eval(token)
            self.show(verified.contexts, self._tree.tokens)
            self._unread.append(token)
            self.queue_draft(mx.array(position, dtype=mx.int32), position)
            return
        choice = self.sampler.choose(verified.logits, self._tree, self._drafted.noise)
        found = self._found = accept(self._tree, choice)
        mx.async_eval(found.summary)  # apart from the draft, so that the host need not wait for that too
        self.root, self.context = found.next_token, verified.contexts[found.last]
        if self._reader is not None:
            path = found.path
            rows = verified.contexts[path], self._tree.tokens[path]
            self._reader.observe(Rows(*rows, self.cache.length, found.num_accepted + 1))
        position = self.cache.length + 1
        self.queue_draft(found.num_accepted + position, position, self._tree.height)

    def show(self, contexts: mx.array | None, tokens: mx.array) -> None:
        """Show the last rows that the cache has committed, (n, C) and (n,), to a drafter that reads all of them."""
        if self._reader is not None and contexts is not None:
            self._reader.observe(Rows(contexts, tokens, self.cache.length - tokens.shape[0]))

    def queue_draft(self, position: mx.array, low: int, slack: int = 0) -> None:
        """Queue the draft of what follows `root`, which stands at `position` () int32, low ... low + slack."""
        beam = self.policy.shape()
        if beam is None or self._drafter is None:
            self._draft = None
            return
        ahead = position + mx.arange(1, beam.length + 1, dtype=mx.int32)
        noise = self.sampler.noise(ahead, low, slack + beam.length + 1)
        temperature = self.sampler.sampling.temperature
        shared = None if noise is None else noise[:-1] * temperature
        seen = Seen(self.context, self.root, shared, position)
        candidates = self._drafter.draft(seen, beam)
        is_open = beam.nodes is None and not candidates.is_chain
        self._draft = _Draft(beam, candidates, noise, candidates.num_offered() if is_open else None)

    def commit(self) -> list[int]:
        """Read what the step has brought and keep it; the one wait of a step."""
        if self._drafted is None:
            count = len(self._unread) - (0 if self.is_drafting else 1)
            return [token for _ in range(count) for token in self._read_plain()]
        assert self._found is not None
        queued = self._draft
        if queued is not None:
            mx.async_eval(self.draft_output)
            if queued.num_offered is not None:
                mx.eval(self._found.summary, queued.num_offered)
        self.stats.syncs += 1
        path, tokens = self._found.read()
        self.keep(path)
        beam, candidates = self._drafted.beam, self._drafted.candidates
        return self._note(Outcome(beam, candidates, len(path) - 1, self._elapsed()), tokens)

    def keep(self, path: list[int]) -> None:
        """Commit the nodes of `path`, root first, in the KV cache and in the counts of the penalties."""
        self.cache.keep(path)
        self.sampler.commit(self._tree.tokens, path)

    def flush(self) -> list[int]:
        """The tokens of plain steps that were launched and not read yet."""
        self._begun = time.perf_counter()
        return [token for _ in range(len(self._unread)) if self._remaining for token in self._read_plain()]

    def _read_plain(self) -> list[int]:
        self.stats.syncs += 1
        # an operation on it, token[0], would queue behind the step just launched
        token = cast(int, self._unread.pop(0).item())
        return self._note(Outcome(None, None, 0, self._elapsed()), [token])

    def _elapsed(self) -> float:
        """Seconds since the step began, or since this was asked before."""
        now = time.perf_counter()
        seconds, self._begun = now - self._begun, now
        return seconds

    def _note(self, outcome: Outcome, tokens: list[int]) -> list[int]:
        """Record a step; returns those of its tokens that the text takes."""
        nodes = 1 if outcome.beam is None else self._tree.num_nodes
        self.num_accepted = outcome.num_accepted
        end = next((index + 1 for index, token in enumerate(tokens) if token in self._ends), None)
        if end is not None:
            tokens = tokens[:end]
            self._remaining = len(tokens)
        tokens = tokens[: int(min(len(tokens), self._remaining))]
        self._remaining -= len(tokens)
        self.stats.observe(nodes, len(tokens))
        if self._drafter is not None:
            self._drafter.keep(tokens)
        self.policy.observe(outcome)
        return tokens

"""The data path: `step`, and `Text`, the state of one text between two steps.

    tree     the best N nodes of what was drafted and looked up, node 0 the root
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
from .drafters.lookup import Lookup, Offer, TextLookup
from .policy import Outcome, Policy
from .sampling import Sampler, Sampling
from .stats import Stats
from .target import Target, Verified
from .target.cache import KVCache
from .tree import Beam, Candidates, TokenTree, build, chain, merge, num_matching

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
    body = len(prompt) - 1 if len(prompt) > SHORT_PROMPT or target.depends_on_cut else 0
    for start in range(0, body, block):
        part = tokens[start : min(start + block, body)]
        text.show(target.extend(part, text.cache).run, part)
        mx.eval(text.cache.arrays())
        mx.clear_cache()
    if body:
        text.cache.mark()  # where another answer to the same prompt would begin
    verified = target.extend(tokens[body:], text.cache)
    text.show(verified.run, tokens[body:])
    text.begin(verified)
    first = text.root
    if not text.is_drafting and text.needs_step:  # a plain step runs while the host looks at the first token
        text.accept(target.verify(text.tree(), text.cache))
    token = int(first)
    text.tell([token])
    return token


@dataclass(frozen=True, slots=True)
class _Draft:
    """What the drafter was asked for."""

    beam: Beam
    candidates: Candidates
    noise: mx.array | None
    """(L, V) Gumbel noise of the positions after the root"""
    num_offered: mx.array | None
    """() int32: rows to verify but the root; None where that was decided beforehand"""


class Text:
    """One text being decoded.

    Args:
        drafter: None drafts nothing but what is looked up, whatever the policy says.
        cache: holds `prompt` but for what `prefill` will be given.
        prompt: all tokens before the first one that is chosen.
        lookup: None looks nothing up.
        max_tokens: the text ends after so many; None: never.
        ends: tokens that end the text, also within an accepted path.
    """

    def __init__(  # noqa: PLR0913  (three by keyword)
        self,
        target: Target,
        drafter: Drafter | None,
        cache: KVCache,
        policy: Policy,
        sampling: Sampling,
        prompt: Sequence[int],
        *,
        lookup: Lookup | None = None,
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
        self.sources: list[str] = []
        """what drafted each of the last step's accepted tokens"""
        self._branches = target.branches
        self._drafter = None if drafter is None else begin_text(drafter, cache, prompt)
        self._reader = cast(RowReader, self._drafter) if drafter is not None and drafter.needs_rows else None
        self._source = "" if drafter is None else drafter.source
        self._drafts_late = drafter is not None and drafter.needs_text
        self._lookup: TextLookup | None = None
        if lookup is not None and policy.lookup_shape is not None:
            self._lookup = lookup.start(prompt, sampling.is_greedy)
        self._ends = ends
        self._remaining = float("inf") if max_tokens is None else max_tokens - 1  # after the first
        self._beam: Beam | None = None  # of the next step's draft
        self._draft: _Draft | None = None  # that draft, once it is queued
        self._waits = False  # True: nothing is queued, and the next step waits for the text
        self._tree = chain(mx.zeros((1,), dtype=mx.int32))  # of the step under way
        self._drafted: _Draft | None = None  # what that tree was built from
        self._offer: Offer | None = None  # and this
        self._merged: Candidates | None = None  # both
        self._probs: tuple[
            float, ...
        ] = ()  # path probabilities of what was looked up, also where that is not offered
        self._noise: mx.array | None = None  # (L, V) of the positions after its root
        self._found: Acceptance | None = None
        self._unread: list[mx.array] = []  # tokens (1,) of plain steps that the host has not read
        self._begun = 0.0

    @property
    def needs_step(self) -> bool:
        """False once all tokens that are wanted have been read, or will be by `flush`."""
        return self._remaining > len(self._unread)

    @property
    def is_drafting(self) -> bool:
        """True where the next step is not plain for certain, so that it cannot be launched ahead."""
        return self._beam is not None or self._waits

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
        self.queue_draft(mx.array(position, dtype=mx.int32), position, unread=1)

    def tree(self) -> TokenTree:
        """The nodes to verify in this step: the best of what was drafted and looked up, or the root alone."""
        self._begun = time.perf_counter()
        if self._beam is not None and self._drafts_late:
            self._draft = self._queued(
                self._beam, mx.array(self.cache.length, dtype=mx.int32), self.cache.length
            )
        draft, self._drafted, self._draft, self._found = self._draft, self._draft, None, None
        self._offer = None
        if self.is_drafting:
            self._offer = self._looked_up()
        self._merged, nodes = self._candidates(draft)
        if self._merged is None or nodes == 1:
            self._tree = chain(self.root.reshape(1))
        else:
            self._tree = build(self._merged, self.root, nodes)
            self._noise = self._noise_of(draft, self._tree.height)
        return self._tree

    def _candidates(self, draft: _Draft | None) -> tuple[Candidates | None, int]:
        """All that is offered for this step, and how many rows to verify of it."""
        offer, self._offer = self._offer, None
        self._probs = () if offer is None else tuple(offer.probs)
        if offer is not None and draft is not None and not self._branches:  # one chain, not a tree of two
            if self.policy.prefers_lookup(draft.beam, self._probs):
                self._drafted = draft = None
            else:
                offer = None
        beam = None if draft is None else self._beam
        nodes = self.policy.rows(beam, self._probs) if offer is not None and self._probs else None
        if offer is not None and nodes is not None:
            self._offer = offer
            looked_up = offer.candidates(to_merge=draft is not None)
            if draft is None:
                return looked_up, min(nodes, 1 + looked_up.num_candidates)
            return merge(looked_up, draft.candidates), max(2, nodes)
        if draft is None:
            return None, 1
        most = draft.candidates.num_candidates + 1
        if draft.num_offered is not None:  # known since the last synchronization
            return draft.candidates, 1 + cast(int, draft.num_offered.item())
        return draft.candidates, min(draft.beam.nodes or most, most)

    def _noise_of(self, draft: _Draft | None, height: int) -> mx.array | None:
        """Noise (height + 1, V) of the positions after the root; what a queued draft shares is not made again."""
        shared = None if draft is None else draft.noise
        have = 0 if shared is None else shared.shape[0]
        if height + 1 <= have:
            return shared
        first = self.cache.length + 1
        more = self.sampler.noise(first + mx.arange(have, height + 1, dtype=mx.int32), first, height + 1)
        return more if shared is None or more is None else mx.concatenate([shared, more])

    def accept(self, verified: Verified) -> None:
        """Choose the target's tokens, find the path, and queue the draft of the next step."""
        if self._tree.num_nodes == 1:
            position = self.cache.length + 1
            noise = self.sampler.noise(mx.array([position], dtype=mx.int32), position, 1)
            token = self.sampler.choose(verified.logits, self._tree, noise)
            self.sampler.commit(self._tree.tokens)
            self.cache.commit(1)
            self.root, self.context = token[0], verified.contexts[0]
            mx.async_eval(token)
            self.show(verified.contexts, self._tree.tokens)
            self._unread.append(token)
            self.queue_draft(mx.array(position, dtype=mx.int32), position, unread=len(self._unread))
            return
        choice = self.sampler.choose(verified.logits, self._tree, self._noise)
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

    def queue_draft(self, position: mx.array, low: int, slack: int = 0, unread: int = 0) -> None:
        """Queue the draft of what follows `root`, which stands at `position` () int32, low ... low + slack.

        Without one, decide whether the next step waits for the text, of which the host lacks `unread` plain tokens.
        """
        self._draft, self._waits = None, False
        self._beam = None if self._drafter is None else self.policy.shape()
        if self._beam is not None:
            if not self._drafts_late:
                self._draft = self._queued(self._beam, position, low, slack)
        elif self._lookup is not None:
            ahead = self._looked_up() if unread else None
            self._waits = not unread or self.policy.awaits([] if ahead is None else ahead.probs[unread:])

    def _looked_up(self) -> Offer | None:
        """What the text as the host knows it is likely to go on with, having stood in it before."""
        shape = self.policy.lookup_shape
        offer = None if self._lookup is None or shape is None else self._lookup.offer(shape)
        return offer if offer is None or self._branches else offer.best_path()

    def _queued(self, beam: Beam, position: mx.array, low: int, slack: int = 0) -> _Draft:
        assert self._drafter is not None
        ahead = position + mx.arange(1, beam.length + 1, dtype=mx.int32)
        noise = self.sampler.noise(ahead, low, slack + beam.length + 1)
        temperature = self.sampler.sampling.temperature
        shared = None if noise is None else noise[:-1] * temperature
        candidates = self._drafter.draft(Seen(self.context, self.root, shared, position), beam)
        is_open = beam.nodes is None and not candidates.is_chain
        return _Draft(beam, candidates, noise, candidates.num_offered() if is_open else None)

    def commit(self) -> list[int]:
        """Read what the step has brought and keep it; the one wait of a step."""
        if self._tree.num_nodes == 1:
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
        if self._lookup is not None:
            self._lookup.learn(self._found.phrase(self._tree, path))
        self.keep(path)
        return self._note(self._outcome(tokens), tokens)

    def _rows(self) -> dict[str, int]:
        """The verified rows but the root, by what drafted them."""
        rows = self._tree.num_nodes - 1
        if rows == 0:
            return {}
        if self._offer is None:
            return {self._source: rows}
        if self._drafted is None or self._merged is None:
            return {"lookup": rows}
        size = self._merged.num_candidates - self._drafted.candidates.num_candidates
        looked_up = int((self._merged.best(rows + 1) < size).sum())
        return {"lookup": looked_up, self._source: rows - looked_up}

    def _outcome(self, tokens: list[int]) -> Outcome:
        """What the step says about drafter and lookup; also sets `sources`."""
        draft, offer, num_accepted = self._drafted, self._offer, len(tokens) - 1
        nodes, seconds = self._tree.num_nodes, self._elapsed()
        self.sources = [self._source] * num_accepted
        looked_up = None if self._lookup is None else self._probs
        if offer is not None:
            count = num_matching(offer.tokens, offer.parents, tokens[:-1])
            self.sources[:count] = ["lookup"] * count
        if draft is None:
            return Outcome(None, None, 0, seconds, nodes, len(tokens), looked_up)
        if offer is not None:
            num_accepted = draft.candidates.num_matching(tokens, draft.beam.nodes)
        return Outcome(draft.beam, draft.candidates, num_accepted, seconds, nodes, len(tokens), looked_up)

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
        self.sources = []
        return self._note(Outcome(None, None, 0, self._elapsed(), 1, 1), [token])

    def _elapsed(self) -> float:
        """Seconds since the step began, or since this was asked before."""
        now = time.perf_counter()
        seconds, self._begun = now - self._begun, now
        return seconds

    def _note(self, outcome: Outcome, tokens: list[int]) -> list[int]:
        """Record a step; returns those of its tokens that the text takes."""
        end = next((index + 1 for index, token in enumerate(tokens) if token in self._ends), None)
        if end is not None:
            tokens = tokens[:end]
            self._remaining = len(tokens)
        tokens = tokens[: int(min(len(tokens), self._remaining))]
        self._remaining -= len(tokens)
        self.stats.observe(
            outcome.nodes, len(tokens), self.sources, self._rows() if outcome.nodes > 1 else {}
        )
        self.tell(tokens)
        self.policy.observe(outcome)
        return tokens

    def tell(self, tokens: list[int]) -> None:
        """Let drafter and lookup know what was committed."""
        for each in (self._drafter, self._lookup):
            if each is not None:
                each.keep(tokens)

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
from typing import cast

import mlx.core as mx

from .accept import Acceptance, accept
from .drafters.interface import Drafter, Rows, Seen
from .drafters.lookup import Lookup
from .offers import Offers
from .policy import Outcome, Policy
from .sampling import Sampler, Sampling
from .stats import Stats
from .target import Target, Verified
from .target.cache import KVCache
from .tree import TokenTree, chain

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
    if (
        not text.offers.awaits_text and text.needs_step
    ):  # a plain step runs while the host looks at the first token
        text.accept(target.verify(text.tree(), text.cache))
    token = int(first)
    text.offers.keep([token])
    return token


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
        self.offers = Offers(target, drafter, cache, policy, self.sampler, prompt, lookup)
        self.root = mx.array(0)
        """() int32: chosen by the target, not yet processed"""
        self.context = mx.zeros((0,))
        """(C,) of the last committed token"""
        self.sources: list[str] = []
        """what drafted each of the last step's accepted tokens"""
        self._ends = ends
        self._remaining = float("inf") if max_tokens is None else max_tokens - 1  # after the first
        self._tree = chain(mx.zeros((1,), dtype=mx.int32))  # of the step under way
        self._found: Acceptance | None = None
        self._unread: list[mx.array] = []  # tokens (1,) of plain steps that the host has not read
        self._begun = 0.0

    @property
    def needs_step(self) -> bool:
        """False once all tokens that are wanted have been read, or will be by `flush`."""
        return self._remaining > len(self._unread)

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
        self._begun, self._found = time.perf_counter(), None
        self._tree = self.offers.tree(self.context, self.root)
        return self._tree

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
        choice = self.sampler.choose(verified.logits, self._tree, self.offers.noise)
        found = self._found = accept(self._tree, choice)
        mx.async_eval(found.summary)  # apart from the draft, so that the host need not wait for that too
        self.root, self.context = found.next_token, verified.contexts[found.last]
        if self.offers.reads_rows:
            rows = verified.contexts[found.path], self._tree.tokens[found.path]
            self.offers.show(Rows(*rows, self.cache.length, found.num_accepted + 1))
        position = self.cache.length + 1
        self.queue_draft(found.num_accepted + position, position, self._tree.height)

    def show(self, contexts: mx.array | None, tokens: mx.array) -> None:
        """Show the last rows that the cache has committed, (n, C) and (n,), to a drafter that reads all of them."""
        if contexts is not None:
            self.offers.show(Rows(contexts, tokens, self.cache.length - tokens.shape[0]))

    def queue_draft(self, position: mx.array, low: int, slack: int = 0, unread: int = 0) -> None:
        """Queue the draft of what follows `root`, which stands at `position` () int32, low ... low + slack. The host
        lacks `unread` plain tokens before it.
        """
        self.offers.queue(Seen(self.context, self.root, None, position), low, slack, unread)

    def commit(self) -> list[int]:
        """Read what the step has brought and keep it; the one wait of a step."""
        if self._tree.num_nodes == 1:
            count = len(self._unread) - (0 if self.offers.awaits_text else 1)
            return [token for _ in range(count) for token in self._read_plain()]
        assert self._found is not None
        mx.async_eval(self.offers.output)
        if self.offers.num_offered is not None:
            mx.eval(self._found.summary, self.offers.num_offered)
        self.stats.syncs += 1
        path, tokens = self._found.read()
        if self.offers.learns_phrases:
            self.offers.learn(self._found.phrase(self._tree, path))
        self.keep(path)
        self.sources = self.offers.sources(tokens)
        return self._note(self.offers.outcome(tokens, self._tree.num_nodes, self._elapsed()), tokens)

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
        rows = self.offers.rows(outcome.nodes) if outcome.nodes > 1 else {}
        self.stats.observe(outcome.nodes, len(tokens), self.sources, rows)
        self.offers.keep(tokens)
        self.policy.observe(outcome)
        return tokens

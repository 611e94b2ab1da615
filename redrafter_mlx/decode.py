"""The data path: prefill, decode steps, streaming.

One step, everything between two synchronisations being one lazy graph:

    verify   one target forward over the tree's N rows
    choose   the target's own token after every node
    accept   the path on which tree and target agree
    draft    the beam search for the next step, from the path's last hidden state, queued before the host looks
    read     the one synchronisation: path and next token; the draft goes on while the host builds the next step
    keep     commit the path in the KV cache

Plain decoding is the same with a tree of one node; its path is known in advance, so it runs a step
ahead.

Letters: N nodes, L beam length counting the root, C context size, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import cast

import mlx.core as mx

from .accept import Acceptance, accept
from .cache import KVCache
from .drafter import RecurrentDrafter
from .policy import Policy
from .sampling import PositionNoise, Sampling, TokenCounts, choose, penalised
from .search import search
from .target import Target, Verified
from .tree import Beam, Levels, TokenTree, ancestor_mask, build, chain, survivors

PREFILL_BLOCK = 2048  # prompt tokens per forward
SHORT_PROMPT = 32  # up to here one forward is cheaper than two


@dataclass(slots=True)
class Stats:
    """What a generation did. Times are in seconds, memory in bytes."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    """of the prompt, found in the KV cache"""
    generated_tokens: int = 0
    token_ids: list[int] = field(default_factory=list)
    steps: int = 0
    """target forwards after the prefill"""
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    accepted_by_depth: list[int] = field(default_factory=list)
    """entry d: steps in which at least d+1 draft tokens were accepted"""
    syncs: int = 0
    """times the host waited for the device after the prefill"""
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    peak_memory_bytes: int = 0
    seed: int | None = None
    finish_reason: str | None = None
    """"stop" or "length"; None while running"""

    @property
    def tokens_per_step(self) -> float:
        """Acceptance length: tokens a step yields, the next token included."""
        return 1 + self.accepted_tokens / self.steps if self.steps else 0.0

    @property
    def acceptance(self) -> tuple[float, ...]:
        """Share of steps in which at least 1, 2, ... draft tokens were accepted."""
        return tuple(count / self.steps for count in self.accepted_by_depth)

    @property
    def tokens_per_second(self) -> float:
        """Decoding alone; the first token belongs to the prefill."""
        return (self.generated_tokens - 1) / self.decode_seconds if self.decode_seconds else 0.0

    def observe(self, nodes: int, num_accepted: int) -> None:
        self.steps += 1
        self.drafted_tokens += nodes - 1
        self.accepted_tokens += num_accepted
        self.accepted_by_depth += [0] * (num_accepted - len(self.accepted_by_depth))
        for depth in range(num_accepted):
            self.accepted_by_depth[depth] += 1

    def add(self, other: Stats) -> None:
        """Count the steps of another generation too."""
        for name in (
            "steps",
            "drafted_tokens",
            "accepted_tokens",
            "syncs",
            "prefill_seconds",
            "decode_seconds",
        ):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        both = zip_longest(self.accepted_by_depth, other.accepted_by_depth, fillvalue=0)
        self.accepted_by_depth = [mine + theirs for mine, theirs in both]
        self.peak_memory_bytes = max(self.peak_memory_bytes, other.peak_memory_bytes)

    def to_dict(self) -> dict[str, object]:
        values: dict[str, object] = {name: getattr(self, name) for name in self.__slots__}
        values["tokens_per_step"] = round(self.tokens_per_step, 4)
        values["tokens_per_second"] = round(self.tokens_per_second, 3)
        return values


@dataclass(frozen=True, slots=True)
class Draft:
    """A queued beam search and what it was made from."""

    beam: Beam
    levels: Levels
    noise: mx.array | None
    """(L, V) Gumbel noise of the positions after the root"""
    alive: mx.array | None
    """(L-1, W) bool: on a surviving beam; None where the number of rows to verify is settled beforehand"""


class Decoder:
    """One text being decoded.

    Carried from step to step: the KV cache, `root` (chosen by the target, not yet processed),
    `hidden` (the context of the last committed token) and the queued draft.
    """

    def __init__(
        self,
        target: Target,
        drafter: RecurrentDrafter | None,
        cache: KVCache,
        policy: Policy,
        sampling: Sampling,
    ) -> None:
        self.target, self.drafter, self.cache = target, drafter, cache
        self.policy, self.sampling = policy, sampling.seeded()
        self.stats = Stats(seed=self.sampling.seed)
        self.counts: TokenCounts | None = None
        self.noise: PositionNoise | None = None
        if not self.sampling.is_greedy:
            assert self.sampling.seed is not None
            self.noise = PositionNoise(self.sampling.seed, target.vocab_size)
        self.root = mx.array(0)
        self.hidden = mx.zeros((0,))
        self.draft: Draft | None = None
        self._height = 1  # tokens the step under way can emit
        self.ahead: mx.array | None = None  # token of a plain step that was launched and not yet read
        # tokens still wanted after the first; no plain step is launched for more
        self.wanted = float("inf")

    def prefill(self, tokens: Sequence[int], history: Sequence[int] = ()) -> int:
        """Process the prompt in blocks and choose the first token. `history`: what the cache holds
        already.
        """
        if self.sampling.has_penalties:
            self.counts = TokenCounts.of([*history, *tokens], self.target.vocab_size)
        prompt = mx.array(list(tokens), dtype=mx.int32)
        # The head would run over every row of a forward whose logits are asked for, so a long prompt's last
        # token goes alone, as in mlx-lm.
        body = len(tokens) - 1 if len(tokens) > SHORT_PROMPT else 0
        for start in range(0, body, PREFILL_BLOCK):
            self.target.extend(prompt[start : min(start + PREFILL_BLOCK, body)], self.cache)
            mx.eval(self.cache.arrays())
        out = self.target.extend(prompt[body:], self.cache)
        position = mx.array([self.cache.length], dtype=mx.int32)
        noise = self._noise_at(position, self.cache.length, 1)
        logits = out.logits
        if self.counts is not None:
            none = mx.zeros((1, 1), dtype=mx.bool_)
            logits = penalised(logits, self.sampling, self.counts, mx.zeros((1,), mx.int32), none)
        self.root, self.hidden = choose(logits, self.sampling, noise)[0], out.hidden[0]
        first = self.root
        self._queue_draft(position[0])
        if self.draft is None and self.wanted > 0:
            self.ahead = self._launch_plain()  # runs while the host looks at the first token
        return int(first)

    def steps(self) -> Iterator[list[int]]:
        """The tokens of each step, accepted draft tokens first, then the target's next one; until there are
        as many as `wanted`, or for ever.
        """
        while self.wanted > 0:
            if self.draft is None:
                yield from self._plain_steps()
            else:
                yield self._step(self.draft)

    def _step(self, draft: Draft) -> list[int]:
        begun = time.perf_counter()
        tree = self._tree(draft)
        verified = self._verify(tree)
        found = self._accept(tree, verified, draft)
        mx.async_eval(found.packed)  # apart from the draft, so that the host need not wait for that too
        self.root, self.hidden = found.next_token, verified.hidden[found.last]
        self._queue_draft(found.num_accepted + (self.cache.length + 1))
        path, tokens = self._read(found)
        self._keep(path)
        if self.counts is not None:
            self.counts.add(tree.tokens[mx.array(path)])
        self._note(draft, tree.num_nodes, tokens, begun)
        return tokens

    def _plain_steps(self) -> Iterator[list[int]]:
        """Steps of one node. The next is launched before the last one's token is read: nothing
        depends on it.
        """
        while self.draft is None:
            begun = time.perf_counter()
            if self.ahead is not None and self.wanted == 1:
                yield self._read_plain(self.ahead, begun)
                return
            token = self._launch_plain()
            if self.ahead is not None:
                yield self._read_plain(self.ahead, begun)
            self.ahead = token
            self._queue_draft(mx.array(self.cache.length, dtype=mx.int32))
        if self.ahead is not None:
            token, self.ahead = self.ahead, None
            yield self._read_plain(token, time.perf_counter())

    def _launch_plain(self) -> mx.array:
        """Queue one plain step and commit its node; returns its token (1,), unread."""
        tree = self.root_tree()
        verified = self._verify(tree)
        position = self.cache.length + 1
        noise = self._noise_at(mx.array([position], dtype=mx.int32), position, 1)
        token = self._choose(verified.logits, tree, noise)
        if self.counts is not None:
            self.counts.add(tree.tokens)
        self.cache.commit(1)
        self.root, self.hidden = token[0], verified.hidden[0]
        mx.async_eval(token)
        return token

    def root_tree(self) -> TokenTree:
        """The tree of the root alone: plain decoding's."""
        return chain(self.root.reshape(1))

    def _verify(self, tree: TokenTree) -> Verified:
        return self.target.verify(tree, self.cache)

    def _accept(self, tree: TokenTree, verified: Verified, draft: Draft) -> Acceptance:
        return accept(tree, self._choose(verified.logits, tree, draft.noise))

    def _keep(self, path: list[int]) -> None:
        self.cache.keep(path)

    def _read_plain(self, token: mx.array, begun: float) -> list[int]:
        self.stats.syncs += 1
        # an operation on it, token[0], would queue behind the step just launched
        tokens = [cast(int, token.item())]
        self._note(None, 1, tokens, begun)
        return tokens

    def _note(self, draft: Draft | None, nodes: int, tokens: list[int], begun: float) -> None:
        self.wanted -= len(tokens)
        self.stats.observe(nodes, len(tokens) - 1)
        beam, levels = (draft.beam, draft.levels) if draft is not None else (None, None)
        self.policy.observe(beam, levels, len(tokens) - 1, time.perf_counter() - begun)

    def _noise_at(self, positions: mx.array, low: int, count: int) -> mx.array | None:
        """Noise rows of positions (L,), which lie in low ... low + count - 1; None when greedy."""
        return None if self.noise is None else self.noise.at(positions, low, low + count)

    def _queue_draft(self, position: mx.array) -> None:
        """Queue the search for what follows `root`, which stands at `position` () int32."""
        beam = self.policy.shape()
        if beam is None or self.drafter is None:
            self.draft = None
            return
        ahead = position + mx.arange(1, beam.length + 1, dtype=mx.int32)
        # the root stands at most a whole draft behind the committed positions the host knows of
        noise = self._noise_at(ahead, self.cache.length + 1, self._height + beam.length)
        drafter_noise = None
        if noise is not None:
            ids = self.drafter.target_ids()
            rows = noise[:-1] if ids is None else mx.take(noise[:-1], ids, axis=1)
            drafter_noise = rows * self.sampling.temperature
        levels = search(
            self.drafter, self.hidden, self.root, self.target.embed,
            width=beam.width, length=beam.length, noise=drafter_noise,
        )  # fmt: skip
        is_open = beam.nodes is None and beam.width > 1
        self.draft = Draft(beam, levels, noise, survivors(levels) if is_open else None)
        self._height = beam.length

    def _read(self, found: Acceptance) -> tuple[list[int], list[int]]:
        """Wait for the device, once: for what was accepted and, where that decides how many rows to verify,
        for the next draft. Otherwise the draft goes on while the host builds what follows.
        """
        queued = self.draft
        if queued is not None:
            mx.async_eval(queued.levels.tokens, queued.levels.logprobs)
            if queued.alive is not None:
                mx.eval(found.packed, queued.alive)
        self.stats.syncs += 1
        return found.read()

    def _tree(self, draft: Draft) -> TokenTree:
        """The nodes worth verifying of a queued draft."""
        levels, alive = draft.levels, draft.alive
        if alive is None:
            return build(levels, self.root, draft.beam.nodes or draft.beam.length)
        # only what lies on a surviving beam
        levels = Levels(levels.tokens, levels.slots, mx.where(alive, levels.logprobs, -1e30))
        return build(levels, self.root, 1 + int(alive.sum()))

    def _choose(self, logits: mx.array, tree: TokenTree, noise: mx.array | None) -> mx.array:
        """The target's own token after every node. noise (L, V): row d belongs to the nodes of
        depth d.
        """
        if self.counts is not None:
            mask = ancestor_mask(tree.parents, tree.height) if tree.mask is None else tree.mask
            logits = penalised(logits, self.sampling, self.counts, tree.tokens, mask)
        return choose(logits, self.sampling, None if noise is None else noise[tree.depth])

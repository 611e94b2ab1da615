"""What a model can verify: trees, chains, or nothing. Compared with plain decoding when a drafter is loaded.

A model may derive more from the order of its rows than this package knows of: then a tree, or even a chain, gives other
logits than plain decoding, and drafts would change the text. That may show only far into a text: where a sliding window
begins to move, a chunk ends, an indexer begins to drop blocks, a scaling by position takes its next step. So the check
is made near the beginning and around all such lengths that the model's configuration names. A text of such a length
costs nothing: its rows are those of a short one, over and over and disturbed (`KVCache.stretch`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Protocol

import mlx.core as mx

from redrafter_mlx.device import on_gpu
from redrafter_mlx.tree import TokenTree, ancestor_mask, chain

from .cache import KVCache
from .keys_values import ChunkedKeysValues, KeysValues

_log = logging.getLogger("redrafter_mlx")

PROMPT = (0, 1, 2, 7, 5, 3)
TOKENS = (1, 2, 3, 4, 5)
PARENTS = (0, 0, 0, 2, 1)
DEPTH = (0, 1, 1, 2, 2)
PATH = (0, 2, 3)
"""nodes of one path, not the first rows"""
NEXT = 6
"""token after the path's second node"""

LENGTH_WORDS = ("window", "chunk", "block", "topk", "original_max_position", "floor_scale")
"""A number in the configuration whose name holds one of these is a length at which a model may change its ways."""
MOST_LENGTHS = 10
ROUNDING = {mx.float32: 1e-3}
ROUNDING_GPU = {mx.float32: 5e-3}  # products may be of less precision there
ROUNDING_16_BIT = 0.08
"""Root mean square of what rounding changes in a row of logits, in their spread: thousandths of that were seen in
float32, a fifth of it in 16 bit; what is wrong changes more than a tenth."""
MOST_ROWS = 4096  # of a layer without a window, in a check
MOST_BYTES = 256 << 20  # of all layers' rows in a check

_FAILURES = (ValueError, TypeError, RuntimeError, IndexError, AttributeError, KeyError, AssertionError)


@dataclass(frozen=True, slots=True)
class Drafts:
    """What a model can verify."""

    branches: bool
    """trees"""
    chains: bool
    reason: str
    """why not more; empty where trees can be verified"""

    @classmethod
    def of(cls, cache: KVCache) -> Drafts:
        """What the layers' states allow."""
        reason = cache.follows_one_path
        return cls(not reason, True, reason)


class Verified(Protocol):
    @property
    def logits(self) -> mx.array:
        """(N, V)"""


class Checked(Protocol):
    """A `Target`, as far as it is checked."""

    name: str
    model: Any
    max_length: int | None
    vocab_size: int
    dtype: mx.Dtype
    drafts: Drafts

    def new_cache(self) -> KVCache:
        """An empty cache."""

    def extend(self, tokens: mx.array, cache: KVCache) -> object:
        """A run of text, committed."""

    def verify(self, tree: TokenTree, cache: KVCache) -> Verified:
        """A tree, to be kept."""


def check_drafts(target: Checked) -> Drafts:
    """Compare trees and chains with plain decoding. Logs a warning where less is exact than the states allow."""
    allowed = Drafts.of(target.new_cache())
    plain = {length: _plain(target, length) for length in _lengths(target)}
    why_no_chains = _first_difference(target, plain, is_tree=False)
    if why_no_chains:
        found = Drafts(False, False, why_no_chains)
        _log.warning("%s is decoded plainly, without drafts: %s", target.name, why_no_chains)
        return found
    if not allowed.branches:
        return allowed
    why_no_trees = _first_difference(target, plain, is_tree=True)
    if why_no_trees:
        _log.warning("%s verifies chains only: %s", target.name, why_no_trees)
        return Drafts(False, True, why_no_trees)
    return allowed


def _first_difference(target: Checked, plain: dict[int | None, mx.array], is_tree: bool) -> str:
    """Why drafts are not verified exactly; empty where they are, at all lengths, for which `plain` has the logits."""
    kind = "a tree" if is_tree else "a chain"
    allowed, target.drafts = target.drafts, Drafts(True, True, "")
    try:
        for length, want in plain.items():
            try:
                got = _drafted(target, length, is_tree)
            except _FAILURES as error:
                words = (str(error) or type(error).__name__).splitlines()[0]
                return f"{kind} cannot be verified ({words})"
            difference = _difference(got, want, target.dtype)
            if difference is not None:
                where = f"after {len(PROMPT) if length is None else length} tokens"
                return f"{where} the logits of {kind} differ by {difference:.2g} of their spread from plain decoding"
    finally:
        target.drafts = allowed
    return ""


def _past(target: Checked, length: int | None) -> KVCache:
    """A cache of a short text; with `length`, as if it were so long."""
    cache = target.new_cache()
    target.extend(mx.array(PROMPT, dtype=mx.int32) % target.vocab_size, cache)
    if length is not None:
        per_row = sum(array.nbytes // array.shape[2] for s in cache.states if isinstance(s, KeysValues)
                      for array in s.arrays())  # fmt: skip
        cache.stretch(length, min(MOST_ROWS, max(64, MOST_BYTES // max(per_row, 1))))
    return cache


def _plain(target: Checked, length: int | None) -> mx.array:
    """Logits (4, V) after each node of the path, and after the token that follows its second one, row by row."""
    cache, again = _past(target, length), _past(target, length)
    rows = [_one(target, cache, TOKENS[node]) for node in PATH]
    for node in PATH[:2]:
        _one(target, again, TOKENS[node])
    return mx.concatenate([*rows, _one(target, again, NEXT)])


def _one(target: Checked, cache: KVCache, token: int) -> mx.array:
    logits = target.verify(chain(mx.array([token], dtype=mx.int32) % target.vocab_size), cache).logits
    cache.commit(1)
    mx.eval(logits, cache.arrays())
    return logits


def _drafted(target: Checked, length: int | None, is_tree: bool) -> mx.array:
    """The same logits, the path being verified in one forward and its second node the last that is kept."""
    cache = _past(target, length)
    tokens = mx.array(TOKENS, dtype=mx.int32) % target.vocab_size
    nodes = list(PATH)
    if is_tree:
        parents = mx.array(PARENTS, dtype=mx.int32)
        tree = TokenTree(tokens, parents, mx.array(DEPTH, dtype=mx.int32), ancestor_mask(parents, 2), 2)
    else:
        tree, nodes = chain(tokens[mx.array(PATH)]), [0, 1, 2]
    logits = target.verify(tree, cache).logits[mx.array(nodes)]
    mx.eval(logits)
    cache.keep(nodes[:2])
    return mx.concatenate([logits, _one(target, cache, NEXT)])


def _difference(got: mx.array, want: mx.array, dtype: mx.Dtype) -> float | None:
    """By how much logits (n, V) differ, in the row where they do most, in the spread of logits; None where that is no
    more than rounding. Tokens that are ruled out (-inf) must be the same.
    """
    got, want = got.astype(mx.float32), want.astype(mx.float32)
    distance = mx.where(got == want, 0, got - want)
    spread = mx.where(want == -mx.inf, 0, want).std()
    worst: float = (mx.sqrt((distance * distance).mean(axis=-1)).max() / spread).tolist()  # type: ignore[assignment]
    return None if worst <= (ROUNDING_GPU if on_gpu() else ROUNDING).get(dtype, ROUNDING_16_BIT) else worst


def _lengths(target: Checked) -> list[int | None]:
    """Lengths of text to check at; None: that of the prompt. Some begin just before a length that the model or its
    layers name, so that the checked rows cross it.
    """
    states = target.new_cache().states
    named = {state.window for state in states if isinstance(state, KeysValues) and state.window}
    named |= {state.chunk for state in states if isinstance(state, ChunkedKeysValues)}
    numbers = dict(_numbers(getattr(target.model, "args", None)))
    lengths = {value for name, value in numbers.items() if any(word in name for word in LENGTH_WORDS)}
    sizes = {value for name, value in numbers.items() if "block_size" in name}
    counts = {value for name, value in numbers.items() if "topk" in name or "blocks" in name}
    blocks = {size * count for size in sizes for count in counts}
    most = (target.max_length or 1 << 20) - 8
    wanted = [length - 2 for length in sorted(named)] + [2 * length + 1 for length in sorted(named)]
    wanted += [length + 2 * size - 2 for length in sorted(blocks) for size in sorted(sizes)]
    wanted += [length - 2 for length in sorted(lengths - named)]
    usable = [length for length in dict.fromkeys(wanted) if len(PROMPT) < length <= most]
    return [None, *usable[:MOST_LENGTHS]]


def _numbers(args: Any, name: str = "") -> Iterator[tuple[str, int]]:
    """Names and values of all integers of a configuration, nested ones among them."""
    if isinstance(args, int) and not isinstance(args, bool):
        yield name, args
    elif isinstance(args, dict):
        for key, value in args.items():
            yield from _numbers(value, str(key))
    elif is_dataclass(args):
        for field in fields(args):
            yield from _numbers(getattr(args, field.name), field.name)

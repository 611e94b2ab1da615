"""Measuring generation fairly: every arm on every prompt in turn, in one process, on the same weights.

Used by `redrafter bench` and `redrafter tune`. An arm is a way to generate; its runs differ in nothing
else. The order of the arms rotates from prompt to prompt, so that a machine that slows down slows all of
them alike.
"""

from __future__ import annotations

import importlib.metadata
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .accept import Acceptance
from .cost import CostTable
from .decode import Decoder, Draft, Stats
from .device import device_name, on_gpu
from .generation import Model, encode, generate, make_policy
from .policy import Fixed, Policy
from .prompts import Request
from .sampling import Sampling
from .target import Verified
from .tree import Beam, Levels, TokenTree
from .weights import nbytes

MT_BENCH = Path(__file__).parent / "data" / "mt_bench.jsonl"
MAX_WIDE_NODES = 32


@dataclass(frozen=True, slots=True)
class Run:
    """One arm on one prompt."""

    token_ids: list[int]
    prefill_seconds: float
    decode_seconds: float
    stats: Stats | None = None

    @property
    def tokens_per_second(self) -> float:
        """Decoding alone, the first token belonging to the prefill."""
        return (len(self.token_ids) - 1) / self.decode_seconds if self.decode_seconds else 0.0


Arm = Callable[[list[int]], Run]


@dataclass(slots=True)
class Comparison:
    """All arms on all prompts: name -> a run per prompt."""

    categories: list[str]
    runs: dict[str, list[Run]] = field(default_factory=dict)

    def rate(self, arm: str) -> tuple[float, float, float]:
        """Tokens per second over the prompts: first quartile, median, third quartile."""
        return quartiles([run.tokens_per_second for run in self.runs[arm]])

    def ratio(self, arm: str, base: str, category: str | None = None) -> tuple[float, float, float]:
        """Quartiles of the speed of one arm over another's, prompt by prompt."""
        pairs = zip(self.categories, self.runs[arm], self.runs[base], strict=True)
        return quartiles(
            [
                a.tokens_per_second / b.tokens_per_second
                for name, a, b in pairs
                if (category is None or name == category) and b.tokens_per_second
            ]
        )

    def total(self, arm: str) -> float:
        """Tokens per second of all prompts together."""
        runs = self.runs[arm]
        seconds = sum(run.decode_seconds for run in runs)
        return sum(len(run.token_ids) - 1 for run in runs) / seconds if seconds else 0.0


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        value = values[0] if values else 0.0
        return value, value, value
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def own_arm(model: Model, draft: str, max_tokens: int, sampling: Sampling) -> Arm:
    """This project's own decoding."""

    def run(prompt: list[int]) -> Run:
        _, stats = generate(model, prompt, max_tokens=max_tokens, sampling=sampling, draft=draft)
        return Run(stats.token_ids, stats.prefill_seconds, stats.decode_seconds, stats)

    return run


def mlx_lm_arm(
    model: Model, max_tokens: int, sampling: Sampling, draft_model: nn.Module | None = None
) -> Arm:
    """mlx-lm's `stream_generate` on the same weights; with `draft_model` its speculative decoding."""
    from mlx_lm import stream_generate
    from mlx_lm.sample_utils import make_sampler

    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ValueError(f"{model.target.name} has no tokenizer, and mlx-lm's stream_generate needs one")
    sampler = make_sampler(
        temp=sampling.temperature, top_p=sampling.top_p % 1, min_p=sampling.min_p, top_k=sampling.top_k
    )

    def run(prompt: list[int]) -> Run:
        mx.random.seed(sampling.seed or 0)
        tokens, begun, first = [], time.perf_counter(), 0.0
        for response in stream_generate(
            model.target.model, tokenizer, prompt, max_tokens=max_tokens, sampler=sampler,
            draft_model=draft_model,
        ):  # fmt: skip
            tokens.append(int(response.token))
            first = first or time.perf_counter()
        return Run(tokens, first - begun, time.perf_counter() - first)

    return run


def compare(
    arms: dict[str, Arm], prompts: Sequence[list[int]], categories: Sequence[str], warmup: int = 1
) -> Iterator[Comparison]:
    """Run every arm on every prompt, interleaved; yields the comparison so far after each prompt."""
    for arm in arms.values():
        for prompt in prompts[:warmup]:
            arm(prompt)
    result = Comparison([], {name: [] for name in arms})
    names = list(arms)
    for index, prompt in enumerate(prompts):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            result.runs[name].append(arms[name](prompt))
        result.categories.append(categories[index])
        yield result


def spread(requests: Sequence[Request], limit: int | None) -> list[Request]:
    """At most `limit` requests, evenly over the file, so that every category stays present."""
    if limit is None or limit >= len(requests):
        return list(requests)
    return [requests[index * len(requests) // limit] for index in range(limit)]


def encoded(model: Model, requests: Sequence[Request], context: int | None) -> list[list[int]]:
    """Token ids of every prompt, with a `context` about so many: other prompts' text then goes before its last message.

    Raises:
        ValueError: lengthening without a tokenizer.
    """
    prompts = [encode(model, request.prompt) for request in requests]
    if context is None:
        return prompts
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ValueError(f"--context needs a tokenizer, and {model.target.name} has none")
    text = "\n\n".join(request.messages(None)[-1]["content"] for request in requests)
    filler = tokenizer.encode(text, add_special_tokens=False)
    filler = filler * (1 + context // len(filler))
    out = []
    for request, prompt in zip(requests, prompts, strict=True):
        *earlier, last = request.messages(None)
        before = tokenizer.decode(filler[: max(0, context - len(prompt))])
        longer = {**last, "content": f"{before}\n\n{last['content']}"}
        out.append(encode(model, [*earlier, longer]) if before else prompt)
    return out


class ProfiledDecoder(Decoder):
    """A decoder that waits after each stage and adds up the seconds. Slower than the real one, by design."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.seconds = dict.fromkeys(("draft", "verify", "accept", "keep", "host"), 0.0)
        self.ops = 0

    def _timed(self, stage: str, call: Callable[[], Any], arrays: Callable[[Any], Any]) -> Any:
        begun = time.perf_counter()
        out = call()
        built = time.perf_counter()
        mx.eval(arrays(out))
        self.seconds[stage] += time.perf_counter() - built
        self.seconds["host"] += built - begun
        return out

    def _verify(self, tree: TokenTree) -> Verified:
        out: Verified = self._timed(
            "verify", lambda: super(ProfiledDecoder, self)._verify(tree), lambda v: (v.hidden, v.logits)
        )
        return out

    def _accept(self, tree: TokenTree, verified: Verified, draft: Draft) -> Acceptance:
        out: Acceptance = self._timed(
            "accept", lambda: super(ProfiledDecoder, self)._accept(tree, verified, draft), lambda a: a.packed
        )
        return out

    def _queue_draft(self, position: mx.array) -> None:
        self._timed(
            "draft",
            lambda: super(ProfiledDecoder, self)._queue_draft(position),
            lambda _: [] if self.draft is None else self.draft.levels.logprobs,
        )

    def _keep(self, path: list[int]) -> None:
        self._timed("keep", lambda: super(ProfiledDecoder, self)._keep(path), lambda _: self.cache.arrays())


def profile(
    model: Model, prompt: list[int], draft: str, max_tokens: int, sampling: Sampling
) -> dict[str, float]:
    """Milliseconds per step by stage. Stages are timed apart, so their sum exceeds a real step's time."""
    policy: Policy = make_policy(model, draft, sampling.is_greedy)
    decoder = ProfiledDecoder(model.target, model.drafter, model.target.new_cache(), policy, sampling)
    decoder.cache.reserve(len(prompt) + max_tokens + 64)
    decoder.prefill(prompt)
    decoder.seconds = dict.fromkeys(decoder.seconds, 0.0)
    count = 0
    for tokens in decoder.steps():
        count += len(tokens)
        if count >= max_tokens:
            break
    return {stage: 1000 * s / decoder.stats.steps for stage, s in decoder.seconds.items()}


def ops_per_step(model: Model, prompt: list[int], draft: str, sampling: Sampling) -> int:
    """Operations in the lazy graph of one decode step, as `mx.export_to_dot` lists them."""
    import io

    policy = make_policy(model, draft, sampling.is_greedy)
    decoder = Decoder(model.target, model.drafter, model.target.new_cache(), policy, sampling)
    decoder.prefill(prompt)
    mx.eval(decoder.root, decoder.hidden)
    if decoder.draft is None:
        tree = decoder.root_tree()
        outputs = [decoder.target.verify(tree, decoder.cache).logits.argmax(axis=-1)]
    else:
        mx.eval(decoder.draft.levels.tokens, decoder.draft.levels.logprobs)
        draft_now = decoder.draft
        tree = decoder._tree(draft_now)
        verified = decoder._verify(tree)
        found = decoder._accept(tree, verified, draft_now)
        decoder._queue_draft(found.num_accepted + (decoder.cache.length + 1))
        outputs = [found.packed, decoder.draft.levels.logprobs]
    graph = io.StringIO()
    mx.export_to_dot(graph, *outputs)
    return graph.getvalue().count("shape=rectangle")


def bytes_per_step(model: Model, beam_length: int) -> dict[str, int]:
    """Bytes of weights a decode step reads: the target once, the drafter once per level.

    An embedding that is only looked up is not counted; one that is the output head too is.
    """
    target = model.target
    total = nbytes(target.model)
    if target.has_own_head:
        total -= nbytes(target.embedding)
    out = {"target": total, "drafter": 0}
    if model.drafter is not None and beam_length > 1:
        out["drafter"] = (beam_length - 1) * model.drafter.nbytes
    return out


def machine() -> dict[str, Any]:
    """What every figure has to name."""
    versions = {name: importlib.metadata.version(name) for name in ("mlx", "mlx-lm")}
    return {
        "device": "gpu" if on_gpu() else "cpu",
        "chip": device_name(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
        "commit": _commit(),
    }


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return result.stdout.strip() or None


@dataclass(frozen=True, slots=True)
class Looks:
    """What wide searches found on real text: per step the path log-probabilities, and what was accepted."""

    logprobs: list[np.ndarray]
    """(L-1, W) per step"""
    trust: np.ndarray
    """(L-1,) accepted per predicted, by depth"""
    tokens_per_step: float


def wide_searches(model: Model, prompts: Sequence[list[int]], max_tokens: int) -> Looks:
    """Decode greedily with the widest draft `auto` knows, keeping every search's probabilities."""
    from .auto import WIDE

    beam = Beam(*WIDE, nodes=MAX_WIDE_NODES)
    kept: list[np.ndarray] = []
    predicted, accepted = np.full(beam.length - 1, 1e-6), np.zeros(beam.length - 1)
    steps = 0

    class Recording(Fixed):
        def observe(
            self, beam: Beam | None, levels: Levels | None, num_accepted: int, seconds: float
        ) -> None:
            nonlocal steps
            assert levels is not None
            kept.append(np.array(levels.logprobs))
            probs = np.exp(kept[-1])
            bar = np.sort(probs.reshape(-1))[-(MAX_WIDE_NODES - 1)]
            predicted[:] += np.where(probs >= bar, probs, 0).sum(axis=1)
            accepted[:num_accepted] += 1
            steps += 1

    for prompt in prompts:
        decoder = Decoder(model.target, model.drafter, model.target.new_cache(), Recording(beam), Sampling())
        decoder.prefill(prompt)
        count = 0
        for tokens in decoder.steps():
            count += len(tokens)
            if count >= max_tokens:
                break
    return Looks(kept, accepted / predicted, round(1 + float(accepted.sum()) / steps, 4))


@dataclass(frozen=True, slots=True)
class Prediction:
    """Speed-up over plain decoding that costs and acceptance imply."""

    by_shape: dict[str, float]
    by_nodes: dict[str, float]
    advice: str


def predict(
    table: CostTable, looks: Looks, widths: Sequence[int], lengths: Sequence[int], budgets: Sequence[int]
) -> Prediction:
    """Expected tokens over expected seconds, for every width x length (all nodes) and every node budget."""
    verify = table.verify_seconds()

    def speedup(width: int, length: int, nodes: int) -> float:
        tokens = 0.0
        for logprobs in looks.logprobs:
            probs = (np.exp(logprobs) * looks.trust[:, None])[: length - 1, :width]
            tokens += 1 + float(np.sort(probs.reshape(-1))[::-1][: nodes - 1].sum())
        seconds = len(looks.logprobs) * (verify[nodes] + table.draft_seconds(width, length))
        return round(tokens / seconds * float(verify[1]), 4)

    by_shape = {f"{w}x{n}": speedup(w, n, 1 + w * (n - 1)) for w in widths for n in lengths}
    by_nodes = {str(n): speedup(8, 5, n) for n in budgets}
    choices = {
        (w, n, b): speedup(w, n, b) for w in widths for n in lengths for b in budgets if b <= 1 + w * (n - 1)
    }
    (width, length, nodes), best = max(choices.items(), key=lambda item: item[1])
    rows, draft = verify[nodes] / verify[1], table.draft_seconds(width, length) / verify[1]
    why = (
        f"{nodes} rows cost {rows:.2f} plain steps and the draft {draft:.2f}, "
        f"for {best * (rows + draft):.2f} tokens a step"
    )
    if best > 1.02:
        advice = f"auto will draft here, about {width}x{length}@{nodes} ({best:.2f}x predicted): {why}"
    else:
        advice = (
            f"auto will decode plainly here: the best draft, {width}x{length}@{nodes}, is {best:.2f}x: {why}"
        )
    return Prediction(by_shape, by_nodes, advice)

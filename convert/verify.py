"""Whether a drafter drafts for a target, and what that costs: a few prompts decoded, and the machine measured.

Sizes alone do not tell: a drafter of another model of the same sizes, or one with damaged weights, loads and drafts,
and the text is right all the same, since the target checks every token. Only nothing of the draft is ever accepted.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from redrafter_mlx.auto import cost_table
from redrafter_mlx.generation import Model, encode, generate
from redrafter_mlx.loading.load import load
from redrafter_mlx.measure.compare import MT_BENCH, spread
from redrafter_mlx.measure.profile import bytes_per_step
from redrafter_mlx.prompts import read_requests
from redrafter_mlx.stats import Stats

from .drafter import DrafterOptions, convert_drafter, is_converted, load_target
from .source import locate

PROMPTS, MAX_TOKENS = 4, 48
WIDTH, LENGTH = 4, 4  # of the beams that are searched, where the drafter is not limited to less
FEW = 0.05  # share of steps with an accepted token below which a drafter cannot have been made for its target


@dataclass(frozen=True, slots=True)
class Verified:
    """What a target did with the drafts for a few prompts."""

    target: str
    draft: str
    prompts: int
    stats: Stats

    @property
    def is_little(self) -> bool:
        """True where so little is accepted that the drafter was hardly made for this target."""
        return self.stats.acceptance[0] < FEW

    def lines(self) -> dict[str, str]:
        """Label -> text."""
        stats = self.stats
        depths = ", ".join(f"{100 * share:.0f} %" for share in stats.acceptance)
        lines = {
            "verified with": self.target,
            "decoded": f"{stats.decoded_tokens} tokens for {self.prompts} prompts, draft {self.draft}",
            "tokens per step": f"{stats.tokens_per_step:.2f} (1 without a drafter)",
            "accepted": f"{depths} of the steps at least 1, 2, ... tokens of the draft",
        }
        if self.is_little:
            lines["warning"] = "this little can be accepted by chance: was it made for this target?"
        return lines


def verify(model: Model, where: str) -> Verified:
    """Decode a few prompts with the model's drafter and count what the target accepts.

    Prompts are MT-bench's where there is a tokenizer, and random tokens where there is none.

    Args:
        where: the drafter, for messages.

    Raises:
        ValueError: nothing is accepted, or nothing could be drafted.
    """
    assert model.drafter is not None
    width = min(WIDTH, model.drafter.max_width)
    length = min(LENGTH, model.drafter.max_length or LENGTH)
    draft = f"{width}x{length}"
    total, prompts = Stats(), _prompts(model)
    for prompt in prompts:
        total.add(generate(model, prompt, max_tokens=MAX_TOKENS, draft=draft)[1])
    name = model.target.name
    if not total.drafted_tokens:
        raise ValueError(f"{where} cannot be verified: {name} ends every answer at once")
    if not total.accepted_tokens:
        raise ValueError(
            f"{name} accepts none of the {total.drafted_tokens} tokens that {where} drafts in {total.steps} steps: "
            "it was made for another model, or its weights are damaged"
        )
    return Verified(name, draft, len(prompts), total)


def _prompts(model: Model) -> list[list[int]]:
    if model.tokenizer is None:
        rng = np.random.default_rng(0)
        return [rng.integers(0, model.target.vocab_size, 16).tolist() for _ in range(PROMPTS)]
    raw = not model.tokenizer.has_chat_template
    requests = spread(read_requests(MT_BENCH), PROMPTS)
    return [
        encode(model, request.messages(None)[-1]["content"] if raw else request.prompt, raw)
        for request in requests
    ]


def verify_folder(folder: Path, target: str, where: str) -> Verified:
    """`verify` for a drafter's folder and the name of a target.

    Raises:
        FileNotFoundError, ValueError: see `load` and `verify`.
    """
    return verify(load(target, folder), where)


def verify_source(source: str, target: str) -> Verified:
    """`verify` for a drafter of any kind, also one that is not converted.

    Raises:
        FileNotFoundError, ValueError: no drafter there; see `verify`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        return verify_folder(_converted(source, Path(scratch)), target, source)


def costs(source: str, target: str) -> dict[str, str]:
    """What drafting for a target costs on this machine: label -> text; the reason where the drafter does not fit it.

    Raises:
        FileNotFoundError, ValueError: no target there, or nothing that drafts.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = _converted(source, Path(scratch))
        load_target(target)  # what is wrong with the target is an error, and no matter of fit
        try:
            model = load(target, folder)
        except ValueError as error:
            return {f"fits {target}": f"no: {str(error).replace(str(folder), source)}"}
        assert model.drafter is not None
        width = min(WIDTH, model.drafter.max_width)
        length = min(LENGTH, model.drafter.max_length or LENGTH)
        table = cost_table(model.target, model.drafter, on_measure=lambda: None)
        plain, rows = table.rows[1], table.verify_seconds()
        read = bytes_per_step(model, length)
        nodes = min(1 + width * (length - 1), max(table.rows))
        return {
            f"fits {target}": "yes",
            "a plain step": f"{1000 * plain:.2f} ms, reads {megabytes(read['target'])}",
            f"a draft {width}x{length}": f"{1000 * table.draft_seconds(width, length):.2f} ms, reads "
            f"{megabytes(read['drafter'])} in {length - 1} levels",
            f"a step that verifies {nodes} rows": f"{rows[nodes] / plain:.2f} plain steps, the draft not counted",
        }


def _converted(source: str, scratch: Path) -> Path:
    """The folder itself where it loads as it is, else one converted into `scratch`."""
    path = locate(source, "drafter")
    if is_converted(path):
        return path
    convert_drafter(str(path), scratch / "drafter", DrafterOptions(), lambda _: None)
    return scratch / "drafter"


def megabytes(count: int) -> str:
    """Bytes in words."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"

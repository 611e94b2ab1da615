"""The one table of names: what others call the tensors and settings of a recurrent drafter.

Tensors become Apple's: `rnn_u`, `rnn_w`, `input_proj`, `lm_head.{i}.linear` for block i,
`lm_head.{N}` for the output matrix. Sources: apple/ml-recurrent-drafter (checkpoints), TensorRT-LLM
examples/redrafter (the names it accepts, and those it writes), NVIDIA ModelOpt 0.21-0.27
(`drafter.` beside the base model).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

PREFIXES = ("module.", "_orig_mod.", "drafter.", "model.drafter.")
"""What wrappers put before a name: data parallelism, torch.compile, ModelOpt and TensorRT-LLM."""

OUTPUT = "lm_head.{N}.weight"
"""Stands for the output matrix where the source does not number it."""

TENSORS: tuple[tuple[str, str], ...] = (
    (r"(rnn_u\.weight|rnn_u\.bias|rnn_w\.weight)", r"\1"),
    (r"(?:input_proj|input_projs)\.(weight|bias)", r"input_proj.\1"),
    (r"(?:lm_head|lm_heads|0|layers)\.(\d+)\.linear\.(weight|bias)", r"lm_head.\1.linear.\2"),
    (r"(?:lm_head|lm_heads|0)\.(\d+)\.weight", r"lm_head.\1.weight"),
    (r"lm_head\.weight", OUTPUT),  # TensorRT-LLM's converted checkpoints
    (r"(emb_norm\.weight)", r"\1"),
)
"""(pattern of the whole name without its prefix, ours)."""

SETTINGS: dict[str, tuple[str, ...]] = {
    "hidden_size": ("redrafter_hidden_size", "hidden_size"),
    "exit_dim": ("redrafter_exit_dim", "exit_dim"),
    "num_draft_layers": ("redrafter_num_layers", "num_draft_layers"),
    "rnn": ("redrafter_is_rnn", "rnn"),
    "vocab_size": ("vocab_size",),
}
"""Ours -> the keys others use, the first one present counts."""

DIALECTS: tuple[tuple[str, str], ...] = (
    (r"drafter\.(lm_head\.weight|layers\..*)", "TensorRT-LLM, converted checkpoint"),
    (r"(model\.)?drafter\..*", "NVIDIA ModelOpt"),
    (r"(lm_heads|0)\.\d.*|input_projs\..*", "TensorRT-LLM input"),
    (r"lm_head\.\d+\..*", "Apple"),
)
"""(pattern of any tensor's name, whose habit it is); the first that occurs names the dialect."""


@dataclass(frozen=True, slots=True)
class Named:
    """Tensor names of a source, sorted."""

    ours: dict[str, str]
    """our name -> the source's"""
    dialect: str
    unknown: tuple[str, ...]
    """names that no drafter has"""
    beside: tuple[str, ...]
    """names of a base model stored with the drafter"""


def translate(names: list[str]) -> Named:
    """Find our name for every tensor of a drafter.

    Raises:
        ValueError: two tensors of the source have the same meaning.
    """
    prefixed = [name for name in names if re.match(r"(module\.|_orig_mod\.)*(model\.)?drafter\.", name)]
    mine = prefixed or names
    own = frozenset(mine)
    dialect = next((d for pattern, d in DIALECTS for name in mine if re.fullmatch(pattern, name)), "unknown")
    ours: dict[str, str] = {}
    unknown = []
    for name in mine:
        found = _ours(name)
        if found is None:
            unknown.append(name)
        elif found in ours:
            raise ValueError(f"{ours[found]} and {name} both mean {found}")
        else:
            ours[found] = name
    if OUTPUT in ours:
        blocks = {int(n.split(".")[1]) for n in ours if n.startswith("lm_head.") and ".linear." in n}
        ours[f"lm_head.{max(blocks, default=-1) + 1}.weight"] = ours.pop(OUTPUT)
    return Named(ours, dialect, tuple(unknown), tuple(name for name in names if name not in own))


def _ours(name: str) -> str | None:
    bare = name
    while prefix := next((p for p in PREFIXES if bare.startswith(p)), None):
        bare = bare.removeprefix(prefix)
    for pattern, ours in TENSORS:
        if match := re.fullmatch(pattern, bare):
            return match.expand(ours)
    return None

"""Hydra: heads that also read the tokens drafted before theirs, and Hydra++ with a layer over the text so far.

    x0 = the root, x1 ... xh = drafted tokens, E = the target's input embedding as it is stored
    c  = hidden, the target's last one;  or, with a prefix layer (Hydra++), the layer's output there (prefix.py)
    z  = [c ; E(x0) ; ... ; E(xh)]                                       (h + 2) H values in head h
    z  = residual_h z + SiLU(linear_h z), then z + SiLU(block z) for the other layers
    logits = output_h z + bias_h

With `grounded` false z = c, and all layers are z + SiLU(block z): Medusa's heads, with a bias.

Sources: zankner/Hydra (`mlp_head.py`, `prefix_mlp_head.py`, `hydra_model.py`); paper: arXiv 2402.05109. Where its
authors' inference leaves the prefix layer out (heads that are not grounded), this follows their training.

Letters: H hidden size, V vocabulary, W beam width, L beam length counting the root, C context size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from redrafter_mlx.tree import Beam, Candidates

from .beam import search
from .config import read_config
from .heads import Head, HeadsConfig, HeadsDrafter
from .interface import Rows, Seen, TargetView, TextDrafter
from .prefix import PrefixCache, PrefixConfig, PrefixLayer

MODEL_TYPE = "hydra_heads"


@dataclass(frozen=True, slots=True)
class HydraConfig(HeadsConfig):
    """`config.json` of a folder of Hydra heads, once converted (convert/hydra.py reads the published ones)."""

    model_type: ClassVar[str] = MODEL_TYPE

    grounded: bool = True
    """The heads read the tokens drafted before theirs."""
    prefix: dict[str, Any] | None = None
    """Hydra++: the prefix layer, see `PrefixConfig`; None: there is none."""

    def __post_init__(self) -> None:
        HeadsConfig.__post_init__(self)
        if self.prefix is not None:
            PrefixConfig.from_dict(self.prefix, "prefix")

    @property
    def prefix_config(self) -> PrefixConfig | None:
        return None if self.prefix is None else PrefixConfig.from_dict(self.prefix, "prefix")[0]

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str) -> tuple[HeadsConfig, list[str]]:
        config, unknown = read_config(cls, values, where)
        if config.prefix is not None:
            unknown += [f"prefix.{name}" for name in PrefixConfig.from_dict(config.prefix, where)[1]]
        return config, unknown


class Hydra(HeadsDrafter):
    """The drafter."""

    Config = HydraConfig
    source = "hydra"

    def __init__(self, config: HydraConfig) -> None:
        super().__init__(config)
        size = config.hidden_size
        self.heads = [
            Head(config, size * (head + 2) if config.grounded else size, nn.Linear(size, config.vocab_size))
            for head in range(config.num_heads)
        ]
        if config.prefix_config is not None:
            self.prefix = PrefixLayer(config.prefix_config, size)

    @property
    def needs_rows(self) -> bool:  # type: ignore[override]
        return self.config.prefix is not None

    def start(self, tokens: Sequence[int]) -> TextDrafter:
        return PrefixedText(self) if self.needs_rows else self

    def begin(self, context: mx.array, root: mx.array) -> mx.array:
        """What head 0 reads: (1, 2 H), or (1, H) of heads that are not grounded. context (H,), root () int32."""
        if not self.config.grounded:
            return context[None]
        return mx.concatenate([context[None], self._embed(root.reshape(1))], axis=-1)

    def advance(self, state: mx.array, slots: mx.array, tokens: mx.array, level: int) -> mx.array:
        """What head level + 1 reads, (W, (level + 3) H), after tokens (W,), each behind the beam in its slot (W,)."""
        if not self.config.grounded:
            return state
        return mx.concatenate([state[slots], self._embed(tokens)], axis=-1)

    def _embed(self, tokens: mx.array) -> mx.array:
        """(n,) -> (n, H), without the factor that some targets multiply their embedding by."""
        target: TargetView = self.attached()
        vectors = target.embed(tokens)
        return vectors if target.embedding_scale == 1 else vectors / target.embedding_scale


class PrefixedText:
    """Hydra++ at work on one text: the `RowReader` that keeps its prefix layer's keys and values."""

    def __init__(self, drafter: Hydra) -> None:
        self.drafter = drafter
        self._cache = PrefixCache(drafter.prefix)

    @property
    def shown(self) -> int:
        return self._cache.shown

    def observe(self, rows: Rows) -> None:
        self._cache.observe(rows)

    def trim(self, length: int) -> None:
        self._cache.trim(length)

    def launch(self) -> None:
        self._cache.launch()

    def draft(self, seen: Seen, beam: Beam) -> Candidates:
        cache, position = self._cache, seen.position
        if position is None:  # only timed: the context is the whole text
            cache, position = PrefixCache(self.drafter.prefix), mx.array(1, dtype=mx.int32)
            cache.observe(Rows(seen.context[None], seen.root.reshape(1), 0))
        prefix = cache.output(seen.context, position - 1)
        return search(self.drafter.recurrence(), replace(seen, context=prefix), beam)

    def keep(self, tokens: Sequence[int]) -> None:
        pass

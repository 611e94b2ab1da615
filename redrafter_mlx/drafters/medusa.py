"""Medusa: a head for each of the next tokens, all of which read the target's last hidden state and nothing else.

    z = hidden;  z = z + SiLU(linear_i z), i = 1 ... num_layers;  logits_h = output_h z

Head h guesses the token h + 1 positions after the root, whatever stands between: so a level's guesses are the same
behind every beam, and the best beams are the most probable combinations of them. `output_h` is a head's own (Medusa as
published first, and vLLM's form), or the target's output matrix for all of them ("version 2" of the trainer).

Sources: FasterDecoding/Medusa (`medusa_model.py`, `medusa_model_legacy.py`), vLLM (`medusa.py`: several blocks without
a bias, a reduced vocabulary); paper: arXiv 2401.10774. Their static trees are not needed: the nodes that are verified
are those of the highest probability in every step.

Letters: H hidden size, V the drafter's vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn

from redrafter_mlx.kernels import DenseWeight, Weight, constant_weight

from .config import shown
from .heads import Head, HeadsConfig, HeadsDrafter
from .interface import TargetView

MODEL_TYPE = "medusa_heads"
OUTPUTS = ("own", "target")


@dataclass(frozen=True, slots=True)
class MedusaConfig(HeadsConfig):
    """`config.json` of a folder of Medusa heads, once converted (convert/medusa.py reads the published ones)."""

    model_type: ClassVar[str] = MODEL_TYPE

    output: str = "own"
    """"own": each head has an output matrix (V, H). "target": all use the target's."""
    draft_vocab_size: int | None = None
    """V of the drafter where smaller than vocab_size; tensor `d2t` (V,): target id = draft id + d2t."""

    def __post_init__(self) -> None:
        HeadsConfig.__post_init__(self)
        if self.output not in OUTPUTS:
            raise ValueError(f"output must be {' or '.join(OUTPUTS)}, not {shown(self.output)}")
        size = self.draft_vocab_size
        if size is not None and not 0 < size <= self.vocab_size:
            raise ValueError(
                f"draft_vocab_size must be between 1 and vocab_size {self.vocab_size}, not {shown(size)}"
            )

    @property
    def draft_vocab(self) -> int:
        return self.draft_vocab_size or self.vocab_size


class Medusa(HeadsDrafter):
    """The drafter. One whose heads use the target's output matrix must be attached before it can give logits."""

    Config = MedusaConfig
    source = "medusa"

    def __init__(self, config: MedusaConfig) -> None:
        super().__init__(config)
        size = config.hidden_size

        def output() -> nn.Linear | None:
            return nn.Linear(size, config.draft_vocab, bias=False) if config.output == "own" else None

        self.heads = [Head(config, size, output()) for _ in range(config.num_heads)]
        if config.draft_vocab_size is not None:
            self.d2t = mx.zeros((config.draft_vocab_size,), dtype=mx.int32)
            self.freeze(keys=["d2t"], recurse=False)
        self._rows: Weight | None = None  # the target's; not parameters

    @property
    def target_ids(self) -> mx.array | None:
        if self.config.draft_vocab_size is None:
            return None
        return mx.arange(self.config.draft_vocab_size, dtype=mx.int32) + self.d2t

    @property
    def nbytes(self) -> int:
        return super().nbytes + (0 if self._rows is None else self._rows.nbytes)

    def attach(self, target: TargetView) -> None:
        if self.config.output == "target":
            ids = self.target_ids
            self._rows = target.quantized_rows(ids) or DenseWeight(target.output_rows(ids))
        super().attach(target)
        if not self.training and isinstance(self._rows, DenseWeight):
            self._rows = constant_weight(self._rows.weight, self.num_cores)

    def logits(self, state: mx.array, level: int) -> mx.array:
        """(1, V) at every level: logits for the token after each beam, which are the same for all; float32."""
        if self.config.output == "own":
            return super().logits(state, level)
        self.attached()
        assert self._rows is not None
        return self._rows(self.heads[level](state)).astype(mx.float32)

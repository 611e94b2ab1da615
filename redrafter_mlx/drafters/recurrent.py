"""The recurrent drafter: a small RNN that guesses the next tokens from the target's last hidden state.

Its formulas are in `recurrent_network`, its settings in `recurrent_config`. Here it takes its target, is searched by
beam search, and is copied.

Letters: H hidden size, C context size, X exit_dim, W beam width, L beam length counting the root.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from redrafter_mlx.files import named_weights, weight_bytes
from redrafter_mlx.kernels import DenseWeight

from .beam import BeamDrafter, beams
from .config import check_fit
from .interface import Embed, TargetView
from .quantization import quantize as quantize
from .recurrent_config import MODEL_TYPE as MODEL_TYPE
from .recurrent_config import DrafterConfig as DrafterConfig
from .recurrent_config import changed as changed
from .recurrent_network import RecurrentNetwork


class RecurrentDrafter(RecurrentNetwork, BeamDrafter[tuple[mx.array, mx.array]]):
    """The drafter. A factored one must be attached to its target before it can give logits."""

    Config = DrafterConfig

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__(config)
        self._target: TargetView | None = None
        self._rounded: RecurrentDrafter | None = (
            None  # a copy that searches in place of this one, see `precision`
        )

    @property
    def nbytes(self) -> int:
        """Bytes that one level of a search reads: its own weights and, with a factored head, the target's rows."""
        if self._rounded is not None:
            return self._rounded.nbytes
        return weight_bytes(self) + (self._rows.nbytes if self._rows is not None else 0)

    def attach(self, target: TargetView) -> None:
        """Set the target to draft for: check sizes and embedding scale, watch its layers, take its output rows.

        In evaluation mode, which `eval()` and loading set, the weights are final, and their layout is optimized.

        Raises:
            ValueError: it was made for another target.
        """
        config = self.config
        check_fit(config, target)
        scale = config.embedding_scale
        if config.target and abs(scale - target.embedding_scale) > 1e-3 * abs(scale):
            raise ValueError(
                f"this drafter does not fit the target: it was trained on embeddings scaled by {scale}, "
                f"{target.name} scales by {target.embedding_scale}"
            )
        target.watch(config.context_layers)
        self._target = target
        if config.head == "factored":
            ids = self.target_ids()
            self._rows = target.quantized_rows(ids) or DenseWeight(target.output_rows(ids))
        if not self.training:
            self.optimize_layout(self.num_cores)

    def frozen(self) -> RecurrentDrafter:
        """A drafter that shares the current weights and searches with them while this one trains on."""
        copy = self.unattached()
        copy.eval()
        if self._target is not None:
            copy.attach(self._target)
        return copy

    def unattached(self) -> RecurrentDrafter:
        """A drafter that shares the current weights and has no target."""
        copy = RecurrentDrafter(self.config)
        if self.config.quantization:
            quantize(copy, self.config.quantization)
        copy.load_weights(list(named_weights(self).items()))
        return copy

    def search_with(self, rounded: RecurrentDrafter | None) -> None:
        """Search with a copy of fewer bits, or with this drafter where None; what is saved stays this drafter."""
        self._rounded = rounded

    def recurrence(self) -> Rnn:
        if self._target is None:
            raise ValueError("a drafter must be attached to its target first: attach(target)")
        return Rnn(self._rounded or self, self._target.embed)

    def cost_key(self) -> dict[str, Any]:
        config = self.config if self._rounded is None else self._rounded.config
        return {k: v for k, v in config.to_dict().items() if k not in ("training", "calibration", "target")}

    def beam_search(
        self, hidden: mx.array, root: int, embed: Embed, width: int, length: int
    ) -> tuple[mx.array, mx.array]:
        """The most probable continuations of `root`, best first.

        Args:
            hidden: (C,) context of the last committed token.
            root: token the target has already chosen.
            width: W beams; at most the drafter's vocabulary.
            length: L tokens in a beam, root included.

        Returns:
            beams (W, L) int32 with the root in column 0, and their log-probabilities (W,).
        """
        return beams(Rnn(self, embed), hidden, root, width, length)


@dataclass(frozen=True, slots=True)
class Rnn:
    """The drafter as beam search calls it. Its state is (prepared context (1, X or C), RNN states (W, H))."""

    drafter: RecurrentDrafter
    embed: Embed

    @property
    def vocab(self) -> int:
        return self.drafter.config.draft_vocab

    @property
    def target_ids(self) -> mx.array | None:
        return self.drafter.target_ids()

    @property
    def calibration(self) -> Sequence[float]:
        return self.drafter.config.calibration

    def begin(self, context: mx.array, root: mx.array) -> tuple[mx.array, mx.array]:
        state = self.drafter.next_state(None, self.embed(root.reshape(1)))
        return self.drafter.prepare(context[None]), state

    def logits(self, state: tuple[mx.array, mx.array], level: int) -> mx.array:
        prepared, states = state
        rows = mx.broadcast_to(prepared, (states.shape[0], prepared.shape[1]))
        return self.drafter.head(self.drafter.features(rows, states)).astype(mx.float32)

    def advance(
        self, state: tuple[mx.array, mx.array], slots: mx.array, tokens: mx.array, level: int
    ) -> tuple[mx.array, mx.array]:
        prepared, states = state
        return prepared, self.drafter.next_state(states[slots], self.embed(tokens))


def full_head(drafter: RecurrentDrafter) -> RecurrentDrafter:
    """The same drafter with a full head: the rows times the factor of a factored head are its (V, X) matrix."""
    if drafter.config.head == "full":
        return drafter
    if drafter._rows is None:
        raise ValueError("a drafter with head 'factored' must be attached to its target: attach(target)")
    full = RecurrentDrafter(changed(drafter.config, head="full"))
    weights = named_weights(drafter)
    name = f"lm_head.{drafter.config.num_draft_layers}.weight"
    weights[name] = drafter._rows.dense().astype(mx.float32) @ weights[name].astype(mx.float32)
    full.load_weights(list(weights.items()))
    return full

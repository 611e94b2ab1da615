"""IBM's MLPSpeculator and Snowflake's Arctic speculators: a state that begins as the target's last hidden state and
takes in one drafted token a stage, n_predict times.

    state = hidden, or RMS(hidden) / sqrt 2 where `scale_input`;  cell = 0
    x     = proj_i state + a emb_i(token)                  a^2 = (1 - s^2) D / 2 / s^2,  s = 2^(-1 / (2 n_predict))

    sum_rnn    state = GELU(ln_i x)
    sum_lstm   f, i, o, c = x cut in four;   cell = sigmoid(f) cell + sigmoid(i) GELU(cell_ln c)
               state = sigmoid(o) GELU(state_ln cell)

    logits = head_i state

`ln` divides by the root mean square and has a weight and a bias; GELU is the exact one. Stage i is the i-th drafted
token; with `tie_weights` all stages share their weights, but for the first projection, which reads the target's hidden
size. The embedding is the speculator's own. Sources: foundation-model-stack/fms-extras (`MLPSpeculator`), vLLM
(`mlp_speculator.py`), snowflakedb/ArcticInference (`ArcticLSTMSpeculator`); paper: arXiv 2404.19124.

Letters: H hidden size of the target, D inner size, V vocabulary, W beam width, L beam length counting the root.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from redrafter_mlx.files import weight_bytes
from redrafter_mlx.kernels import optimize_layout
from redrafter_mlx.tree import MAX_NODES

from .beam import BeamDrafter
from .config import check_fit, check_positive, read_config, shown
from .interface import TargetView
from .quantization import check_quantization

MODEL_TYPE = "mlp_speculator"
METHODS = ("sum_rnn", "sum_lstm")

EPSILON = 1e-6  # of every normalization

State = tuple[mx.array, mx.array | None]
"""States (W, D) and, of an LSTM, cells (W, D)."""


@dataclass(frozen=True, slots=True)
class SpeculatorConfig:
    """`config.json` of a speculator's folder, once converted (convert/speculator.py reads the published ones)."""

    model_type: ClassVar[str] = MODEL_TYPE

    vocab_size: int
    """V: tokens the target knows, all of which it can guess."""
    hidden_size: int
    """H of the target."""
    inner_size: int
    """D: width of state and embedding."""
    n_predict: int
    """Stages: tokens it drafts in a row."""
    method: str = "sum_rnn"
    """"sum_rnn": IBM's MLPSpeculator. "sum_lstm": Snowflake's Arctic-LSTM."""
    tie_weights: bool = False
    """All stages share their weights, but for the first projection."""
    tie_lstm_embs: bool = False
    """The gates of an LSTM share one embedding."""
    scale_input: bool = False
    """The hidden state is normalized first."""
    quantization: dict[str, Any] | None = None
    """{"bits", "group_size"} (and "mode") of the stored linear layers, as mlx-lm has them."""
    target: dict[str, Any] = field(default_factory=dict)
    """{"name", "hidden_size", "vocab_size"} of the model this speculator was made for."""

    def __post_init__(self) -> None:
        check_positive(self, ("vocab_size", "hidden_size", "inner_size", "n_predict"))
        if self.n_predict >= MAX_NODES:  # a longer chain could not be verified
            raise ValueError(f"n_predict must be at most {MAX_NODES - 1}, not {shown(self.n_predict)}")
        if self.method not in METHODS:
            raise ValueError(f"method must be {' or '.join(METHODS)}, not {shown(self.method)}")
        if self.tie_weights and self.n_predict < 2:
            raise ValueError("tie_weights is true, but there is nothing to tie with n_predict 1")
        if self.method == "sum_lstm" and not self.tie_weights:
            raise ValueError("tie_weights must be true where method is sum_lstm, not false")
        if self.method != "sum_lstm" and self.tie_lstm_embs:
            raise ValueError(f"tie_lstm_embs must be false where method is {self.method}, not true")
        check_quantization(self.quantization)

    @property
    def num_embeddings(self) -> int:
        """Distinct stages of embeddings, normalizations and heads."""
        return 1 if self.tie_weights else self.n_predict

    @property
    def num_projections(self) -> int:
        """Distinct projections."""
        return 2 if self.tie_weights else self.n_predict

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str) -> tuple[SpeculatorConfig, list[str]]:
        """Read a config; returns it with the unknown keys, which the caller should report.

        Raises:
            ValueError: a config that is not converted, a key missing or with a value it cannot have; `where` is named.
        """
        if "emb_dim" in values and "hidden_size" not in values:
            raise ValueError(
                f"{where} is a speculator as it was published: `redrafter-convert drafter` makes a folder that loads"
            )
        return read_config(cls, values, where)

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON values; optional keys only where they differ from their default."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {
            "model_type": MODEL_TYPE,
            "architectures": ["Speculator"],
            **{name: value for name, value in values.items() if value},
        }


class RMSNorm(nn.Module):
    """x / RMS(x) * weight + bias."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight, self.bias = mx.ones((size,)), mx.zeros((size,))

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, self.weight, EPSILON) + self.bias


class Speculator(nn.Module, BeamDrafter[State]):
    """The drafter, which is itself the recurrence of its beam search, since it has an embedding of its own."""

    Config = SpeculatorConfig
    source = "speculator"

    target_ids: mx.array | None = None
    calibration: Sequence[float] = ()

    def __init__(self, config: SpeculatorConfig) -> None:
        super().__init__()
        self.config = config
        size, is_lstm, count = config.inner_size, config.method == "sum_lstm", config.num_embeddings
        gates = 4 if is_lstm else 1  # forget, input, output, cell
        embedded = size if config.tie_lstm_embs else gates * size
        self.emb = [nn.Embedding(config.vocab_size, embedded) for _ in range(count)]
        self.proj = [
            nn.Linear(size if stage else config.hidden_size, gates * size, bias=False)
            for stage in range(config.num_projections)
        ]
        if is_lstm:
            self.cell_ln, self.state_ln = RMSNorm(size), RMSNorm(size)
        else:
            self.ln = [RMSNorm(size) for _ in range(count)]
        self.head = [nn.Linear(size, config.vocab_size, bias=False) for _ in range(count)]
        kept = 0.5 ** (0.5 / config.n_predict)
        self._embedding_weight = math.sqrt((1 - kept**2) * size / 2) / kept

    @property
    def vocab(self) -> int:
        return self.config.vocab_size

    @property
    def max_length(self) -> int:  # type: ignore[override]
        return self.config.n_predict + 1

    @property
    def nbytes(self) -> int:
        """Bytes that one level of a search reads: projection and head, the mean over the stages."""
        stages = range(self.config.n_predict)
        read = sum(
            weight_bytes(self._of(self.proj, i)) + weight_bytes(self._of(self.head, i)) for i in stages
        )
        return read // self.config.n_predict

    def attach(self, target: TargetView) -> None:
        """Set the target to draft for: check sizes, and in evaluation mode optimize the layout of the weights.

        Raises:
            ValueError: it was made for another target.
        """
        check_fit(self.config, target)
        target.watch(())
        if not self.training:
            layers = nn.Sequential(*self.proj, *self.head)  # not the embeddings: those are only looked up
            optimize_layout(layers, self.num_cores)

    def recurrence(self) -> Speculator:
        return self

    def cost_key(self) -> dict[str, Any]:
        return {name: value for name, value in self.config.to_dict().items() if name != "target"}

    def begin(self, context: mx.array, root: mx.array) -> State:
        """State after the root. context (H,), root () int32."""
        hidden = context[None]
        if self.config.scale_input:
            hidden = mx.fast.rms_norm(hidden, None, EPSILON) / math.sqrt(2)
        return self._advance(hidden, None, root.reshape(1), 0)

    def logits(self, state: State, level: int) -> mx.array:
        """(1, V) at level 0, (W, V) below: logits for the token after each beam so far; float32."""
        return self._of(self.head, level)(state[0]).astype(mx.float32)

    def advance(self, state: State, slots: mx.array, tokens: mx.array, level: int) -> State:
        """State after tokens (W,); token i extends the beam in slot slots[i] of the level before."""
        hidden, cells = state
        return self._advance(hidden[slots], None if cells is None else cells[slots], tokens, level + 1)

    def _advance(self, hidden: mx.array, cells: mx.array | None, tokens: mx.array, stage: int) -> State:
        """hidden (W, H) in stage 0, (W, D) later; tokens (W,)."""
        embedding = self._of(self.emb, stage)(tokens)
        if self.config.tie_lstm_embs:
            embedding = mx.tile(embedding, (1, 4))
        x = self._of(self.proj, stage)(hidden) + self._embedding_weight * embedding
        if self.config.method == "sum_rnn":
            return nn.gelu(self._of(self.ln, stage)(x)), None
        forget, enter, leave, candidate = mx.split(x, 4, axis=-1)
        new = mx.sigmoid(enter) * nn.gelu(self.cell_ln(candidate))
        if cells is not None:
            new = mx.sigmoid(forget) * cells + new
        return mx.sigmoid(leave) * nn.gelu(self.state_ln(new)), new

    def _of(self, layers: list[Any], stage: int) -> Any:
        """The layer of a stage: the last one for all later stages, if weights are tied."""
        return layers[min(stage, len(layers) - 1)]

"""The recurrent drafter: a small RNN that guesses the next tokens from the target's last hidden state.

    s_t = SiLU(rnn_w E(x_t) + rnn_u s_{t-1} + b)     s_0 = 0, E: the target's embedding   (rnn)
    s_t = E(x_t) + s_{t-1}                                                                (no rnn)
    z   = [context ; s_t]        -> input_proj where exit_dim differs
    z   = z + SiLU(linear_i(z))  for every residual block
    logits = lm_head[N] z        head "full";    rows (lm_head[N] z)   head "factored"

`rows` are rows of the target's own output embedding, so a factored drafter carries no vocabulary matrix.
Source: ReDrafter paper (arXiv 2403.09919) section 3 and apple/ml-recurrent-drafter `docs/drafter.md`;
tensor names and config keys are those of Apple's checkpoints.

Letters: B batch, K tokens in a row, H hidden size, C context size (H, or more with `context_layers`), X
exit_dim, V the drafter's vocabulary, W beam width, L beam length counting the root.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from redrafter_mlx.files import named_weights, weight_bytes
from redrafter_mlx.kernels import DenseWeight, Weight, constant_weight, optimize_layout, silu

from .beam import BeamDrafter, beams
from .config import check_fit, check_positive, check_quantization, read_config
from .interface import Embed, TargetView

MODEL_TYPE = "recurrent_drafting_drafter"


@dataclass(frozen=True, slots=True)
class DrafterConfig:
    """`config.json` of a drafter folder. The defaults of optional keys mean "as Apple's"."""

    model_type: ClassVar[str] = MODEL_TYPE

    vocab_size: int
    """Tokens the target knows."""
    hidden_size: int
    """H of the target."""
    exit_dim: int
    """Width of the residual blocks."""
    num_draft_layers: int
    """Residual blocks."""
    rnn: bool = True
    """False: the state is the running sum of the embeddings."""
    head: str = "full"
    """"full": lm_head is (V, exit_dim). "factored": (H, exit_dim), the target's output rows follow."""
    draft_vocab_size: int | None = None
    """V of the drafter where smaller than vocab_size; tensor `d2t` (V,): target id = draft id + d2t."""
    activation: str = "silu"
    """"linear": TensorRT-LLM's RNN, without SiLU and, on the first step, without the bias."""
    context_layers: tuple[int, ...] = ()
    """Outputs of these target layers (from 0), RMS-normalized, join the final hidden state in the context."""
    embedding_scale: float = 1.0
    """What the target multiplies its embedding by; the drafter reads the scaled embedding."""
    calibration: tuple[float, ...] = ()
    """Per depth: temperature that makes the drafter's probabilities true ones. Empty: 1."""
    quantization: dict[str, Any] | None = None
    """{"bits", "group_size"} (and "mode") of the stored linear layers, as mlx-lm has them."""
    target: dict[str, Any] = field(default_factory=dict)
    """{"name", "hidden_size", "vocab_size"} of the model this drafter was made for."""
    training: dict[str, Any] = field(default_factory=dict)
    """How it was made."""

    def __post_init__(self) -> None:
        check_positive(self, ("vocab_size", "hidden_size", "exit_dim"))
        if not isinstance(self.num_draft_layers, int) or self.num_draft_layers < 0:
            raise ValueError(f"num_draft_layers must be 0 or more, not {self.num_draft_layers!r}")
        if self.head not in ("full", "factored"):
            raise ValueError(f"head must be 'full' or 'factored', not {self.head!r}")
        if self.activation not in ("silu", "linear"):
            raise ValueError(f"activation must be 'silu' or 'linear', not {self.activation!r}")
        size = self.draft_vocab_size
        if size is not None and not 0 < size <= self.vocab_size:
            raise ValueError(
                f"draft_vocab_size must be between 1 and vocab_size {self.vocab_size}, not {size}"
            )
        if not all(value > 0 for value in self.calibration):
            raise ValueError(f"calibration must be temperatures above 0, not {list(self.calibration)}")
        if any(layer < 0 for layer in self.context_layers):
            raise ValueError(f"context_layers must be 0 or more, not {list(self.context_layers)}")
        check_quantization(self.quantization)

    @property
    def context_size(self) -> int:
        """C: the final hidden state and the intermediate ones after it."""
        return self.hidden_size * (1 + len(self.context_layers))

    @property
    def draft_vocab(self) -> int:
        """V of the drafter."""
        return self.draft_vocab_size or self.vocab_size

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str) -> tuple[DrafterConfig, list[str]]:
        """Read a config; returns it with the unknown keys, which the caller should report.

        Raises:
            ValueError: another model's config, a key missing or with a value it cannot have; `where` is named.
        """
        kind = values.get("model_type", MODEL_TYPE)
        if kind != MODEL_TYPE:
            raise ValueError(
                f"{where} is not a recurrent drafter: model_type is {kind!r}, not {MODEL_TYPE!r}"
            )
        return read_config(cls, values, where)

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON values; optional keys only where they differ from Apple's."""
        values = {"model_type": MODEL_TYPE, "architectures": ["Drafter"]}
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in ("calibration", "context_layers"):
                value = list(value)
            if value or f.name in ("num_draft_layers", "rnn"):
                values[f.name] = value
        return values


class ResBlock(nn.Module):
    """x + SiLU(linear(x))."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)

    def __call__(self, x: mx.array) -> mx.array:
        return x + silu(self.linear(x))


class RecurrentDrafter(nn.Module, BeamDrafter[tuple[mx.array, mx.array]]):
    """The drafter. A factored one must be attached to its target before it can give logits."""

    Config = DrafterConfig

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.config = config
        size, exit_dim = config.hidden_size, config.exit_dim
        if config.rnn:
            self.rnn_u = nn.Linear(size, size, bias=True)
            self.rnn_w = nn.Linear(size, size, bias=False)
        if self.has_input_proj:
            self.input_proj = nn.Linear(config.context_size + size, exit_dim, bias=True)
        out = config.draft_vocab if config.head == "full" else size
        blocks: list[nn.Module] = [ResBlock(exit_dim) for _ in range(config.num_draft_layers)]
        self.lm_head = [*blocks, nn.Linear(exit_dim, out, bias=False)]
        if config.draft_vocab_size is not None:
            self.d2t = mx.zeros((config.draft_vocab_size,), dtype=mx.int32)
            self.freeze(keys=["d2t"], recurse=False)
        self._target: TargetView | None = None
        self._rows: Weight | None = None  # the target's; not parameters
        self._parts: tuple[Weight, Weight] | None = None  # of input_proj, for the context and for the state
        self._rounded: RecurrentDrafter | None = None  # searched in this one's place, see `precision`

    @property
    def has_input_proj(self) -> bool:
        return self.config.exit_dim != self.config.context_size + self.config.hidden_size

    @property
    def nbytes(self) -> int:
        """Bytes one level of a search reads: the own weights, and the target's rows of a factored head."""
        if self._rounded is not None:
            return self._rounded.nbytes
        return weight_bytes(self) + (self._rows.nbytes if self._rows is not None else 0)

    def attach(self, target: TargetView) -> None:
        """Take the target to draft for: check sizes and embedding scale, watch its layers, take its output rows.

        Weights of a drafter in evaluation mode are final (`eval()`, as loaded): their layout is optimized.

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
            self._optimize_layout()

    def _optimize_layout(self) -> None:
        """Prepare final weights for search: split `input_proj` into its context and state parts, which a search would
        otherwise do at every level, and tile what multiplies few rows.
        """
        num_cores = self.num_cores
        optimize_layout(self, num_cores)
        if isinstance(self._rows, DenseWeight):
            self._rows = constant_weight(self._rows.weight, num_cores)
        if self._splits_projection:
            context, state = (constant_weight(mx.contiguous(each), num_cores) for each in self._projections())
            self._parts = context, state

    def frozen(self) -> RecurrentDrafter:
        """A drafter of the same weights (shared, as they are now) that is ready for search while this one trains."""
        copy = self.unattached()
        copy.eval()
        if self._target is not None:
            copy.attach(self._target)
        return copy

    def unattached(self) -> RecurrentDrafter:
        """A drafter of the same weights (shared, as they are now) without a target."""
        copy = RecurrentDrafter(self.config)
        if self.config.quantization:
            quantize(copy, self.config.quantization)
        copy.load_weights(list(named_weights(self).items()))
        return copy

    def search_with(self, rounded: RecurrentDrafter | None) -> None:
        """Have searches use a copy of fewer bits; what is saved stays this drafter."""
        self._rounded = rounded

    def recurrence(self) -> Rnn:
        if self._target is None:
            raise ValueError("a drafter must be attached to its target first: attach(target)")
        return Rnn(self._rounded or self, self._target.embed)

    def cost_key(self) -> dict[str, Any]:
        config = self.config if self._rounded is None else self._rounded.config
        return {k: v for k, v in config.to_dict().items() if k not in ("training", "calibration", "target")}

    def update(  # type: ignore[override]
        self, parameters: dict[str, Any], strict: bool = True
    ) -> RecurrentDrafter:
        """As `nn.Module.update`; new weights are no longer final."""
        self._parts = None
        super().update(parameters, strict)
        return self

    @property
    def _splits_projection(self) -> bool:
        return self.has_input_proj and not isinstance(self.input_proj, nn.QuantizedLinear)

    def _projections(self) -> tuple[mx.array, mx.array]:
        """Weights of `input_proj` for the context (X, C) and for the state (X, H)."""
        weight, size = self.input_proj.weight, self.config.context_size
        return weight[:, :size], weight[:, size:]

    def _project(self, x: mx.array, part: int) -> mx.array:
        """x times one part of `input_proj`: 0, for the context, or 1, for the state."""
        return x @ self._projections()[part].T if self._parts is None else self._parts[part](x)

    def target_ids(self) -> mx.array | None:
        """(V,) int32: the target's id of every draft token; None where they are the same."""
        if self.config.draft_vocab_size is None:
            return None
        return mx.arange(self.config.draft_vocab_size, dtype=mx.int32) + self.d2t

    def draft_ids(self) -> mx.array:
        """(vocab_size,) int32: the drafter's id of every token of the target; -1 outside its vocabulary."""
        own = mx.arange(self.config.draft_vocab, dtype=mx.int32)
        ids = self.target_ids()
        if ids is None:
            return own
        out = mx.full((self.config.vocab_size,), -1, dtype=mx.int32)
        out[ids] = own
        return out

    def next_state(self, state: mx.array | None, embedding: mx.array) -> mx.array:
        """One RNN step. state (..., H), None before the first token; embedding (..., H) -> (..., H)."""
        if not self.config.rnn:
            return embedding if state is None else embedding + state
        linear = self.config.activation == "linear"
        if state is None:
            x = self.rnn_w(embedding)
            return x if linear else silu(x + self.rnn_u.bias)
        x = self.rnn_w(embedding) + self.rnn_u(state)
        return x if linear else silu(x)

    def states(self, embeddings: mx.array) -> mx.array:
        """RNN state after every token. (B, K, H) -> (B, K, H)."""
        state, out = None, []
        for k in range(embeddings.shape[1]):
            state = self.next_state(state, embeddings[:, k])
            out.append(state)
        return mx.stack(out, axis=1)

    def prepare(self, context: mx.array) -> mx.array:
        """What of `features` depends on the context alone, so that a search computes it once.

        (..., C) -> (..., X), or (..., C) as it is where nothing can be computed ahead.
        """
        if not self._splits_projection:
            return context
        return self._project(context, 0) + self.input_proj.bias

    def features(self, prepared: mx.array, states: mx.array) -> mx.array:
        """From prepared context and states (..., H) to what the vocabulary multiplies, (..., X or H)."""
        if self._splits_projection:
            x = prepared + self._project(states, 1)
        else:
            x = mx.concatenate([prepared, states], axis=-1)
            x = self.input_proj(x) if self.has_input_proj else x
        for layer in self.lm_head[:-1]:
            x = layer(x)
        return self.lm_head[-1](x) if self.config.head == "factored" else x

    def head(self, features: mx.array) -> mx.array:
        """features (..., X or H) -> logits (..., V) over the drafter's vocabulary."""
        if self.config.head == "full":
            return self.lm_head[-1](features)
        if self._rows is None:
            raise ValueError("a drafter with head 'factored' must be attached to its target: attach(target)")
        return self._rows(features)

    def logits(self, hidden: mx.array, tokens: mx.array, embed: Embed) -> mx.array:
        """Logits for the token after each of `tokens`, the RNN being fed with them in order.

        Args:
            hidden: (B, C) the target's hidden state before tokens[:, 0] (final norm applied).
            tokens: (B, K) int, the root first.
            embed: token ids -> vectors (..., H), scaled as the target scales them.

        Returns:
            (B, K, V) over the drafter's vocabulary (`target_ids` names the tokens where it is a reduced
            one).
        """
        states = self.states(embed(tokens))
        prepared = self.prepare(hidden)[:, None]
        prepared = mx.broadcast_to(prepared, (*states.shape[:2], prepared.shape[-1]))
        return self.head(self.features(prepared, states))

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
    """The drafter as a beam search drives it. Its state is (prepared context (1, X or C), RNN states (W, H))."""

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
    """A drafter with a factored head as one with a full head: rows x factor is exactly its (V, X) matrix."""
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


def quantize(drafter: nn.Module, quantization: dict[str, Any]) -> None:
    """Quantize the linear layers in place (those whose input is a multiple of the group size)."""
    group_size = quantization["group_size"]

    def predicate(_: str, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) and module.weight.shape[-1] % group_size == 0

    nn.quantize(drafter, **quantization, class_predicate=predicate)


def changed(config: DrafterConfig, **changes: Any) -> DrafterConfig:
    """A config with other values."""
    return DrafterConfig(**{**asdict(config), **changes})

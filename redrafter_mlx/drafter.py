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

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from .activation import silu
from .few_rows import Product, tile_products
from .files import new_folder, read_json, read_safetensors, write_safetensors
from .weights import check, named, nbytes

MODEL_TYPE = "recurrent_drafting_drafter"
WEIGHTS = "model.safetensors"
# Keys that Hugging Face writes into every config and that say nothing about a drafter.
_BOILERPLATE = {
    "architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "num_lookback_tokens",
    "emb_norm", "rms_norm_eps", "_name_or_path",
}  # fmt: skip

LARGE = 64 << 20
"""Bytes per level from which on a search takes every core: it then outlasts what the host does meanwhile."""

Embed = Callable[[mx.array], mx.array]


class Rows(Protocol):
    """Rows of an output embedding, (V, H): a factored head ends with them."""

    @property
    def nbytes(self) -> int: ...

    def dense(self) -> mx.array: ...

    def __call__(self, x: mx.array) -> mx.array: ...


class Vocabulary(Protocol):
    """What a drafter needs of its target: see `redrafter_mlx.target.Target`."""

    hidden_size: int
    vocab_size: int

    def embed(self, tokens: mx.array) -> mx.array: ...

    def output_rows(self, tokens: mx.array | None) -> mx.array: ...

    def packed_rows(self, tokens: mx.array | None) -> Rows | None: ...


@dataclass(frozen=True, slots=True)
class DrafterConfig:
    """`config.json` of a drafter folder. The defaults of optional keys mean "as Apple's"."""

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
    """Outputs of these target layers (from 0), RMS-normalised, join the final hidden state in the context.
    """
    embedding_scale: float = 1.0
    """What the target multiplies its embedding by; the drafter reads the scaled embedding."""
    calibration: tuple[float, ...] = ()
    """Per depth: temperature that makes the drafter's probabilities true ones. Empty: 1."""
    quantization: dict[str, int] | None = None
    """{"bits", "group_size"} of the stored linear layers."""
    target: dict[str, Any] = field(default_factory=dict)
    """{"name", "hidden_size", "vocab_size"} of the model this drafter was made for."""
    training: dict[str, Any] = field(default_factory=dict)
    """How it was made."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "exit_dim"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a positive integer, not {getattr(self, name)!r}")
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
            ValueError: another model's config, a key missing or with a value that cannot be; `where` is
            named.
        """
        kind = values.get("model_type", MODEL_TYPE)
        if kind != MODEL_TYPE:
            raise ValueError(f"{where} is not a drafter: model_type is {kind!r}, not {MODEL_TYPE!r}")
        known = {f.name: f for f in fields(cls)}
        required = ("vocab_size", "hidden_size", "exit_dim", "num_draft_layers")
        missing = [name for name in required if name not in values]
        if missing:
            raise ValueError(f"{where} lacks {', '.join(missing)}")
        kept = {name: value for name, value in values.items() if name in known}
        for name in ("context_layers", "calibration"):
            if name in kept:
                kept[name] = tuple(kept[name])
        try:
            config = cls(**kept)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        return config, sorted(set(values) - set(known) - _BOILERPLATE)

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


class RecurrentDrafter(nn.Module):
    """The drafter. A factored one must be bound to its target before it can give logits."""

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
        self._rows: Rows | None = None  # the target's; not parameters
        self._halves: tuple[Product, Product] | None = None

    @property
    def has_input_proj(self) -> bool:
        return self.config.exit_dim != self.config.context_size + self.config.hidden_size

    @property
    def nbytes(self) -> int:
        """Bytes one level of a search reads: the own weights, and the target's rows of a factored head."""
        return nbytes(self) + (self._rows.nbytes if self._rows is not None else 0)

    @property
    def is_bound(self) -> bool:
        return self.config.head == "full" or self._rows is not None

    def bind(self, target: Vocabulary) -> RecurrentDrafter:
        """Check that `target` is of the size this drafter was made for and take its output rows.

        Raises:
            ValueError: hidden size or vocabulary differ.
        """
        config = self.config
        for name, mine, theirs in (
            ("hidden_size", config.hidden_size, target.hidden_size),
            ("vocab_size", config.vocab_size, target.vocab_size),
        ):
            if mine != theirs:
                made_for = config.target.get("name", "another model")
                raise ValueError(
                    f"this drafter does not fit the target: {name} is {mine} (made for {made_for}), "
                    f"the target has {theirs}"
                )
        if config.head == "factored":
            ids = self.target_ids()
            self._rows = target.packed_rows(ids) or Product(target.output_rows(ids), shared=False)
        return self

    def settle(self) -> RecurrentDrafter:
        """Say that the weights are final: the two parts of `input_proj`, for the context and for the
        state, are laid out apart, which a search would otherwise do anew at every level, and so are the weights for
        products of few rows. Those of a small drafter stay on one core: the host needs the other, to build the next
        verification while the search runs.
        """
        shared = self.nbytes >= LARGE
        tile_products(self, shared)
        if isinstance(self._rows, Product):
            self._rows = Product(self._rows.weight, shared)
        if self._splits_projection:
            context, state = self._projections()
            self._halves = (
                Product(mx.contiguous(context), shared),
                Product(mx.contiguous(state), shared),
            )
        return self

    def update(  # type: ignore[override]
        self, parameters: dict[str, Any], strict: bool = True
    ) -> RecurrentDrafter:
        """As `nn.Module.update`; new weights are no longer final."""
        self._halves = None
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
        return x @ self._projections()[part].T if self._halves is None else self._halves[part](x)

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
            raise ValueError("a drafter with head 'factored' must be bound to its target first: bind(target)")
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
        from .search import beams_of, search

        levels = search(self, hidden, mx.array(root), embed, width=width, length=length)
        return beams_of(levels, root)


def full_head(drafter: RecurrentDrafter) -> RecurrentDrafter:
    """A drafter with a factored head as one with a full head: rows x factor is exactly its (V, X) matrix."""
    if drafter.config.head == "full":
        return drafter
    if drafter._rows is None:
        raise ValueError("a drafter with head 'factored' must be bound to its target first: bind(target)")
    values = {f.name: getattr(drafter.config, f.name) for f in fields(drafter.config)}
    full = RecurrentDrafter(DrafterConfig(**{**values, "head": "full"}))
    weights = named(drafter)
    name = f"lm_head.{drafter.config.num_draft_layers}.weight"
    weights[name] = drafter._rows.dense().astype(mx.float32) @ weights[name].astype(mx.float32)
    full.load_weights(list(weights.items()))
    return full


def load_drafter(path: str | Path, dtype: mx.Dtype | None = None) -> RecurrentDrafter:
    """Load a drafter folder (`config.json`, `model.safetensors`), Apple's own ones included.

    Args:
        dtype: cast floating weights to this; None keeps what the file has.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: all missing, superfluous and misshapen tensors, in one message.
    """
    folder = Path(path)
    config, unknown = DrafterConfig.from_dict(read_json(folder / "config.json"), str(folder / "config.json"))
    if unknown:
        import warnings

        warnings.warn(f"{folder / 'config.json'}: keys not known here: {', '.join(unknown)}", stacklevel=2)
    drafter = RecurrentDrafter(config)
    if config.quantization:
        quantize_drafter(drafter, **config.quantization)
    weights = read_safetensors(folder / WEIGHTS)
    weights.pop("emb_norm.weight", None)  # Apple's MLX port stores it and never applies it
    check(drafter, weights, str(folder / WEIGHTS))
    if dtype is not None:
        weights = {
            name: array.astype(dtype) if mx.issubdtype(array.dtype, mx.floating) else array
            for name, array in weights.items()
        }
    drafter.load_weights(list(weights.items()))
    drafter.eval()
    return drafter


def quantize_drafter(drafter: RecurrentDrafter, bits: int, group_size: int) -> None:
    """Quantise the linear layers in place (those whose input is a multiple of the group size)."""

    def predicate(_: str, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) and module.weight.shape[-1] % group_size == 0

    nn.quantize(drafter, group_size=group_size, bits=bits, class_predicate=predicate)


def save_drafter(drafter: RecurrentDrafter, path: str | Path, extra: Sequence[tuple[str, str]] = ()) -> None:
    """Write a drafter folder; it appears whole or not at all. `extra`: further text files (name, content)."""
    with new_folder(Path(path)) as folder:
        text = json.dumps(drafter.config.to_dict(), indent=2, sort_keys=True)
        (folder / "config.json").write_text(text + "\n")
        weights = named(drafter)
        write_safetensors(folder / WEIGHTS, weights, {"format": "mlx"})
        for name, content in extra:
            (folder / name).write_text(content)


def with_config(drafter: RecurrentDrafter, **changes: Any) -> RecurrentDrafter:
    """The same drafter (weights shared) under a config with other descriptive values."""
    values = {**asdict(drafter.config), **changes}
    drafter.config = DrafterConfig(**values)
    return drafter

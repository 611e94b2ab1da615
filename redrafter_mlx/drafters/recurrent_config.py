"""The config of a recurrent drafter: the keys of Apple's `config.json`, and our optional ones."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

from .config import check_positive, read_config
from .quantization import check_quantization

MODEL_TYPE = "recurrent_drafting_drafter"


@dataclass(frozen=True, slots=True)
class DrafterConfig:
    """`config.json` of a drafter folder. The defaults of optional keys describe Apple's drafters."""

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
    """Target layers (from 0) whose RMS-normalized outputs follow the final hidden state in the context."""
    embedding_scale: float = 1.0
    """The factor by which the target scales its embedding; the drafter reads the scaled embedding."""
    calibration: tuple[float, ...] = ()
    """Temperature of the logits at each depth, which makes probabilities calibrated. Empty: 1."""
    quantization: dict[str, Any] | None = None
    """{"bits", "group_size"} (and "mode") of the stored linear layers, as mlx-lm has them."""
    target: dict[str, Any] = field(default_factory=dict)
    """{"name", "hidden_size", "vocab_size"} of the model this drafter was made for."""
    training: dict[str, Any] = field(default_factory=dict)
    """Settings and data of its training, for the record."""

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
        """C: the size of the final hidden state and the intermediate ones after it."""
        return self.hidden_size * (1 + len(self.context_layers))

    @property
    def draft_vocab(self) -> int:
        """V of the drafter."""
        return self.draft_vocab_size or self.vocab_size

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str) -> tuple[DrafterConfig, list[str]]:
        """Read a config; returns it with the unknown keys, which the caller should report.

        Raises:
            ValueError: another model's config, a missing key or an invalid value; the message names `where`.
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


def changed(config: DrafterConfig, **changes: Any) -> DrafterConfig:
    """A copy of a config with some values changed."""
    return DrafterConfig(**{**asdict(config), **changes})

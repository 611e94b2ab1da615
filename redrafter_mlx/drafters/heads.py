"""What Medusa's and Hydra's heads share: one head for each drafted token, residual blocks and an output matrix.

    z = block_i(z), i = 1 ... num_layers          block(z) = z + SiLU(linear z)
    logits = output z

In their authors' code the blocks of a head are often one block that is applied several times. Such a block is stored
once: a head has `num_blocks` blocks, and the last one is applied until there were `num_layers`.

Letters: H hidden size, V the drafter's vocabulary, W beam width, L beam length counting the root.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from redrafter_mlx.files import weight_bytes
from redrafter_mlx.kernels import optimize_layout, silu
from redrafter_mlx.tree import MAX_NODES

from .beam import BeamDrafter
from .config import check_fit, check_positive, read_config, shown
from .interface import TargetView
from .quantization import check_quantization
from .recurrent_network import ResBlock

MAX_LAYERS = 64  # nobody has more than a few


@dataclass(frozen=True, slots=True)
class HeadsConfig:
    """What every such drafter's `config.json` has."""

    model_type: ClassVar[str]

    vocab_size: int
    """Tokens the target knows."""
    hidden_size: int
    """H of the target."""
    num_heads: int
    """Tokens it drafts in a row."""
    num_layers: int = 1
    """Blocks that are applied in every head."""
    num_blocks: int | None = None
    """Blocks that are stored, the last one being applied again; None: all are."""
    quantization: dict[str, Any] | None = None
    """{"bits", "group_size"} (and "mode") of the stored linear layers, as mlx-lm has them."""
    target: dict[str, Any] = field(default_factory=dict)
    """{"name", "hidden_size", "vocab_size"} of the model these heads were made for."""

    def __post_init__(self) -> None:
        check_positive(self, ("vocab_size", "hidden_size", "num_heads", "num_layers"))
        if self.num_heads >= MAX_NODES:  # a longer chain could not be verified
            raise ValueError(f"num_heads must be at most {MAX_NODES - 1}, not {shown(self.num_heads)}")
        if self.num_layers > MAX_LAYERS:
            raise ValueError(f"num_layers must be at most {MAX_LAYERS}, not {shown(self.num_layers)}")
        if self.num_blocks is not None and not 1 <= self.num_blocks <= self.num_layers:
            raise ValueError(
                f"num_blocks must be between 1 and num_layers {self.num_layers}, not {shown(self.num_blocks)}"
            )
        check_quantization(self.quantization)

    @property
    def stored_blocks(self) -> int:
        """Blocks of a head that have weights of their own."""
        return self.num_blocks or self.num_layers

    @property
    def draft_vocab(self) -> int:
        """V of the drafter."""
        return self.vocab_size

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str) -> tuple[HeadsConfig, list[str]]:
        """Read a config; returns it with the unknown keys, which the caller should report.

        Raises:
            ValueError: a key missing or with a value it cannot have; `where` is named.
        """
        return read_config(cls, values, where)

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON values; optional keys only where they differ from their default."""
        values: dict[str, Any] = {"model_type": self.model_type, "architectures": ["DraftHeads"]}
        for each in fields(self):
            value = getattr(self, each.name)
            default = each.default if each.default_factory is MISSING else each.default_factory()
            if value != default:
                values[each.name] = value
        return values


class WideBlock(nn.Module):
    """residual(z) + SiLU(linear(z)): the block that takes several vectors, joined, to one."""

    def __init__(self, inputs: int, size: int) -> None:
        super().__init__()
        self.linear, self.residual = nn.Linear(inputs, size), nn.Linear(inputs, size)

    def __call__(self, z: mx.array) -> mx.array:
        return self.residual(z) + silu(self.linear(z))


class Head(nn.Module):
    """One head. Where `output` is None its logits are those of the target's own output matrix."""

    def __init__(self, config: HeadsConfig, inputs: int, output: nn.Linear | None) -> None:
        super().__init__()
        size = config.hidden_size
        first = ResBlock(size) if inputs == size else WideBlock(inputs, size)
        self.blocks = [first, *(ResBlock(size) for _ in range(config.stored_blocks - 1))]
        if output is not None:
            self.output = output
        self._num_layers = config.num_layers

    def applied(self) -> Sequence[nn.Module]:
        """The blocks in the order in which they are applied."""
        return [self.blocks[min(index, len(self.blocks) - 1)] for index in range(self._num_layers)]

    def __call__(self, z: mx.array) -> mx.array:
        """(n, inputs) -> (n, H), what the output matrix multiplies."""
        for block in self.applied():
            z = block(z)
        return z

    @property
    def nbytes(self) -> int:
        """Bytes that the head reads, its own output matrix included."""
        own = weight_bytes(self.output) if "output" in self else 0
        return own + sum(weight_bytes(block) for block in self.applied())


class HeadsDrafter(nn.Module, BeamDrafter[mx.array]):
    """A drafter of such heads, and the recurrence that a beam search drives. The state is what the next head reads."""

    calibration: Sequence[float] = ()
    heads: list[Head]

    def __init__(self, config: HeadsConfig) -> None:
        super().__init__()
        self.config: Any = config
        self._target: TargetView | None = None

    @property
    def vocab(self) -> int:
        return int(self.config.draft_vocab)

    @property
    def target_ids(self) -> mx.array | None:
        """(V,) int32: the target's id of every draft token; None where they are the same."""
        return None

    @property
    def max_length(self) -> int:  # type: ignore[override]
        return int(self.config.num_heads) + 1

    @property
    def nbytes(self) -> int:
        """Bytes one level of a search reads: a head, the mean of all."""
        return sum(head.nbytes for head in self.heads) // len(self.heads)

    def attach(self, target: TargetView) -> None:
        """Take the target to draft for: check sizes, take what is shared with it. In evaluation mode the layout of the
        weights is optimized.

        Raises:
            ValueError: it was made for another target.
        """
        check_fit(self.config, target)
        target.watch(())
        self._target = target
        if not self.training:
            optimize_layout(self, self.num_cores)

    def attached(self) -> TargetView:
        """The target it drafts for.

        Raises:
            ValueError: there is none yet.
        """
        if self._target is None:
            raise ValueError("a drafter must be attached to its target first: attach(target)")
        return self._target

    def recurrence(self) -> HeadsDrafter:
        return self

    def cost_key(self) -> dict[str, Any]:
        return {name: value for name, value in self.config.to_dict().items() if name != "target"}

    def begin(self, context: mx.array, root: mx.array) -> mx.array:
        """What the first head reads: (1, H). context (H,), root () int32."""
        return context[None]

    def logits(self, state: mx.array, level: int) -> mx.array:
        """(1, V) where the state is one row, else (W, V): logits for the token after each beam so far; float32."""
        head = self.heads[level]
        return head.output(head(state)).astype(mx.float32)

    def advance(self, state: mx.array, slots: mx.array, tokens: mx.array, level: int) -> mx.array:
        """What the next head reads, after tokens (W,), each behind the beam in its slot (W,) of the level before."""
        return state

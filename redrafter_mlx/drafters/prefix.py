"""A decoder layer over the contexts of all committed positions, of which the last one's output is wanted.

    n   = RMS(x) w1                                          x: a position's context, scaled by no embedding
    q, k, v = rope(q_proj n), rope(k_proj n), v_proj n
    h   = x + o_proj (softmax(q k^T / sqrt D) v)             over this position and all before it
    m   = RMS(h) w2
    out = RMS(h + down_proj (SiLU(gate_proj m) * up_proj m)) w3

Keys and values of a position are a function of its own context, so a position that is shown costs these two products,
and query, attention and MLP are computed once a draft. How many rows of a step count is known on the device only: all
of them are written, the mask leaves out those behind the position of the query, and the next step overwrites them.

The layer is Llama's with the final norm of the model around it. Source: zankner/Hydra, `prefix_mlp_head.py` and
`modeling_llama_kv.py`; paper: arXiv 2402.05109, section 4 (prefix attention).

Letters: n rows shown at once, T positions shown, H hidden size, K key/value heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.rope_utils import initialize_rope

from redrafter_mlx.kernels import silu

from .config import check_positive, read_config, shown
from .interface import Rows

BLOCK = 256
"""Positions that the buffers grow by; and as many rows wait at most to be written until a draft asks for them."""


@dataclass(frozen=True, slots=True)
class PrefixConfig:
    """What the shapes of the layer's tensors do not say, under the names of a Llama's config, and what they do."""

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    """as mlx-lm has it"""
    max_position_embeddings: int | None = None

    def __post_init__(self) -> None:
        names = ("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size")
        check_positive(self, names)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads must be a multiple of num_key_value_heads {self.num_key_value_heads}, "
                f"not {self.num_attention_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, not {self.head_dim}")
        if not self.rms_norm_eps >= 0:
            raise ValueError(f"rms_norm_eps must be 0 or more, not {self.rms_norm_eps}")
        if not self.rope_theta > 0:
            raise ValueError(f"rope_theta must be above 0, not {self.rope_theta}")
        try:
            self.rope()
        except (KeyError, ValueError, TypeError, ZeroDivisionError, AttributeError) as error:
            raise ValueError(f"rope_scaling {shown(self.rope_scaling)} cannot be used: {error}") from None

    def rope(self) -> Any:
        """The rotation by position, of heads of `head_dim`."""
        return initialize_rope(
            self.head_dim, self.rope_theta, False, self.rope_scaling, self.max_position_embeddings
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str) -> tuple[PrefixConfig, list[str]]:
        """Read it; returns it with the unknown keys.

        Raises:
            ValueError: a key missing or with a value it cannot have; `where` is named.
        """
        config, _ = read_config(cls, values, where)
        return config, sorted(set(values) - {each.name for each in fields(cls)})


class PrefixLayer(nn.Module):
    """The layer and the norm after it."""

    def __init__(self, config: PrefixConfig, size: int) -> None:
        super().__init__()
        self.config = config
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.input_layernorm = nn.RMSNorm(size, eps=config.rms_norm_eps)
        self.q_proj = nn.Linear(size, queries, bias=False)
        self.k_proj = nn.Linear(size, keys, bias=False)
        self.v_proj = nn.Linear(size, keys, bias=False)
        self.o_proj = nn.Linear(queries, size, bias=False)
        self.post_attention_layernorm = nn.RMSNorm(size, eps=config.rms_norm_eps)
        self.gate_proj = nn.Linear(size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, size, bias=False)
        self.norm = nn.RMSNorm(size, eps=config.rms_norm_eps)
        self._rope = config.rope()

    def keys_values(self, contexts: mx.array, start: int) -> tuple[mx.array, mx.array]:
        """Keys and values (1, K, n, D) of contexts (n, H) at positions `start` ... start + n - 1."""
        x = self.input_layernorm(contexts)
        keys = self._rope(self._heads(self.k_proj(x)), offset=start)
        return keys, self._heads(self.v_proj(x))

    def __call__(self, context: mx.array, position: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        """Output (H,) at `position` () int32, whose context is (H,). keys, values (1, K, T, D): of the positions from
        0 on, at least up to this one; those behind it are not attended to.
        """
        query = self._rope(self._heads(self.q_proj(self.input_layernorm(context[None]))), offset=position)
        mask = (mx.arange(keys.shape[2], dtype=mx.int32) <= position)[None]
        found = mx.fast.scaled_dot_product_attention(
            query, keys, values, scale=self.config.head_dim**-0.5, mask=mask
        )  # (1, heads, 1, D)
        h = context[None] + self.o_proj(found.reshape(1, -1))
        m = self.post_attention_layernorm(h)
        return self.norm(h + self.down_proj(silu(self.gate_proj(m)) * self.up_proj(m)))[0]

    def _heads(self, x: mx.array) -> mx.array:
        """(n, heads D) -> (1, heads, n, D)"""
        return x.reshape(x.shape[0], -1, self.config.head_dim).swapaxes(0, 1)[None]


class PrefixCache:
    """The layer's keys and values of one text. Rows wait until a draft asks for them, so that plain decoding hardly
    pays for them.
    """

    def __init__(self, layer: PrefixLayer) -> None:
        self._layer = layer
        self._waiting: list[Rows] = []  # each begins where the rows before it that count end
        self._keys: mx.array | None = None
        self._values: mx.array | None = None
        self.shown = 0
        """positions shown; the last ones may not count"""

    def observe(self, rows: Rows) -> None:
        """See `RowReader.observe`."""
        if rows.start > self.shown:
            raise ValueError(
                f"a drafter that reads every committed position has been shown {self.shown}, and is given those from "
                f"{rows.start}: there is a gap"
            )
        self.trim(rows.start)
        self._waiting.append(rows)
        self.shown = rows.start + rows.contexts.shape[0]
        if rows.count is None and self.shown - self._waiting[0].start >= BLOCK:
            self._write()
            assert self._keys is not None and self._values is not None
            mx.async_eval(self._keys, self._values)

    def trim(self, length: int) -> None:
        """See `RowReader.trim`."""
        self.shown = min(self.shown, length)
        self._waiting = [rows for rows in self._waiting if rows.start < length]

    def output(self, context: mx.array, position: mx.array) -> mx.array:
        """The layer's output (H,) at the last position that counts, () int32, with its context (H,).

        Raises:
            ValueError: nothing has been shown.
        """
        if self.shown == 0:
            raise ValueError("a drafter that reads every committed position has been shown none")
        self._write()
        assert self._keys is not None and self._values is not None
        keys, values = self._keys[..., : self.shown, :], self._values[..., : self.shown, :]
        return self._layer(context, position, keys, values)

    def launch(self) -> None:
        """See `RowReader.launch`. Rows that wait go on waiting."""
        buffers = [each for each in (self._keys, self._values) if each is not None]
        mx.async_eval(buffers, [rows.contexts for rows in self._waiting])

    def _write(self) -> None:
        if not self._waiting:
            return
        start = self._waiting[0].start
        ends = [*(rows.start for rows in self._waiting[1:]), self.shown]
        parts = [rows.contexts[: end - rows.start] for rows, end in zip(self._waiting, ends, strict=True)]
        contexts = mx.concatenate(parts) if len(parts) > 1 else parts[0]
        keys, values = self._layer.keys_values(contexts, start)
        self._keys = _written(self._keys, keys, start)
        self._values = _written(self._values, values, start)
        self._waiting = []


def _written(buffer: mx.array | None, rows: mx.array, start: int) -> mx.array:
    """`buffer` (1, K, T, D), grown where it must be, with `rows` (1, K, n, D) from position `start` on."""
    end = start + rows.shape[2]
    if buffer is None or end > buffer.shape[2]:
        capacity = -(-end // BLOCK) * BLOCK
        tail = mx.zeros((*rows.shape[:2], capacity - start, rows.shape[3]), dtype=rows.dtype)
        buffer = tail if buffer is None else mx.concatenate([buffer[..., :start, :], tail], axis=2)
    buffer[..., start:end, :] = rows
    return buffer

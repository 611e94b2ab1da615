"""The drafter as it is to be used: float16 or quantized, calibrated, with a card of its own folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_map

from redrafter_mlx.drafters.kinds import load_recurrent, save_drafter
from redrafter_mlx.drafters.recurrent import RecurrentDrafter, changed, quantize
from redrafter_mlx.files import weight_bytes
from redrafter_mlx.target import Target
from redrafter_mlx.tree import Beam

from .calibrate import calibrate
from .card import card
from .corpus import Corpus
from .replay import held_out
from .settings import Settings

CALIBRATION_POSITIONS = 4000


@dataclass(frozen=True, slots=True)
class Export:
    """Held-out tokens per step of a drafter before and after its weights were rounded, and its size."""

    before: float
    after: float
    bytes: int


def to_float16(drafter: RecurrentDrafter) -> RecurrentDrafter:
    """Round the drafter's weights to float16, in place. The file halves, and acceptance does not change."""
    drafter.update(
        tree_map(lambda a: a.astype(mx.float16) if a.dtype == mx.float32 else a, drafter.parameters())
    )
    return drafter


def group_size(hidden_size: int, exit_dim: int) -> int:
    """Weights that share a scale when a drafter of these widths is quantized.

    Raises:
        ValueError: no group size divides both.
    """
    for size in (64, 32):
        if hidden_size % size == exit_dim % size == 0:
            return size
    raise ValueError(
        f"a drafter of exit_dim {exit_dim} for hidden size {hidden_size} cannot be quantized: both must be multiples "
        "of 32"
    )


def export(
    source: Path, out: Path, target: Target, corpus: Corpus, bits: int | None, model: str = ""
) -> Export:  # noqa: PLR0913
    """Save the drafter of `source` in float16 or quantized, calibrated on held-out text, and measure what that costs.

    Args:
        bits: 4 or 8; None for float16.
        model: the target as `--model` takes it, for the card; empty: its name.
    """
    if bits not in (None, 4, 8):
        raise ValueError(f"bits must be 4 or 8, not {bits}")
    drafter = load_recurrent(source, mx.float32)
    drafter.train()  # its weights are not final
    drafter.attach(target)
    depths = int(drafter.config.training.get("objective", {}).get("depths", 4))
    settings = Settings()
    rows = target.output_rows(drafter.target_ids()).astype(mx.float32)

    def score() -> float:
        beam = Beam(1, depths + 1)
        return held_out(drafter, target.embed, corpus, beam, settings.validation_tokens).tokens_per_step

    before = score()
    if bits is None:
        to_float16(drafter)
    else:
        sizes = group_size(drafter.config.hidden_size, drafter.config.exit_dim)
        quantization = {"bits": bits, "group_size": sizes}
        quantize(drafter, quantization)
        drafter.config = changed(drafter.config, quantization=quantization)
    after = score()
    calibration: tuple[float, ...] = (1.0,) * depths
    if corpus.num_held_out:
        batches = corpus.held_out(settings.shape, CALIBRATION_POSITIONS)
        calibration = calibrate(drafter, target, rows, batches, depths)
    drafter.config = changed(drafter.config, calibration=calibration)
    text = card(drafter.config, model or target.name, str(out.resolve()))
    save_drafter(drafter, out, [("README.md", text)])
    return Export(before, after, weight_bytes(drafter))

"""A plot of a training run, drawn with matplotlib if that is installed."""

from __future__ import annotations

import json
from pathlib import Path

from redrafter_mlx.files import new_file


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl.

    Raises:
        FileNotFoundError: no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no metrics at {path}")
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def plot(metrics: Path, image: Path) -> None:
    """Loss and held-out tokens per step against positions trained on, as a PNG.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise ValueError("a plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = read_metrics(metrics)
    figure, left = pyplot.subplots(figsize=(6, 3.5))
    positions = [record["positions"] for record in records]
    left.plot(positions, [record["tokens_per_step"] for record in records], "o-", color="tab:blue")
    left.set_xlabel("positions trained on")
    left.set_ylabel("held-out tokens per step", color="tab:blue")
    right = left.twinx()
    losses = [(r["positions"], r["loss"]) for r in records if r["loss"] is not None]
    right.plot([p for p, _ in losses], [loss for _, loss in losses], color="tab:gray")
    right.set_ylabel("loss", color="tab:gray")
    figure.tight_layout()
    with new_file(image) as part:
        figure.savefig(part, format="png", dpi=90)
    pyplot.close(figure)

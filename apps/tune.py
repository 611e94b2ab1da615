"""`redrafter tune`: what drafting costs and brings on this machine, and what `--draft auto` will do about it.

Three measurements: the cost table (seconds by verified rows, seconds of a draft), the drafter's acceptance
on a few prompts, and, unless `--predict` is given, the real speed of every width x length on those prompts.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import DEFAULT_MODEL, DrafterOption, LookupOption, ModelOption, load_model

WIDTHS = (1, 2, 3, 4, 8)
LENGTHS = (2, 3, 4, 5)
BUDGETS = (2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32)


def tune(  # noqa: PLR0913  (typer: one argument per option)
    model: ModelOption = DEFAULT_MODEL,
    drafter: DrafterOption = None,
    lookup: LookupOption = True,
    prompts: Annotated[
        Path | None, typer.Option(help="JSONL of prompts; some of MT-bench's by default.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Prompts to use.")] = 4,
    max_tokens: Annotated[int, typer.Option(min=8, help="Tokens per prompt.")] = 48,
    predict: Annotated[
        bool, typer.Option("--predict", help="Skip the real runs: predict from costs and acceptance.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Write the heat maps to this PNG file.")] = None,
) -> None:
    """Measure this machine and say which drafts pay; the last line is one JSON object."""
    from redrafter_mlx.auto import cost_table
    from redrafter_mlx.files import check_writable
    from redrafter_mlx.generation import encode
    from redrafter_mlx.measure.compare import MT_BENCH, spread
    from redrafter_mlx.measure.machine import machine
    from redrafter_mlx.measure.predict import predict as predict_speed
    from redrafter_mlx.measure.predict import wide_searches
    from redrafter_mlx.prompts import read_requests

    from .console import stderr

    if plot is not None:
        check_writable(plot, "--plot")
        _check_matplotlib()
    loaded = load_model(model, drafter, lookup)
    if loaded.drafter is None:
        raise ValueError(
            f"tune needs a drafter, and {loaded.target.name} has none: give --drafter, or see what lookup alone brings "
            "with redrafter bench"
        )
    console = stderr()
    console.print("measuring what a verified row and a draft cost", style="dim")
    table = cost_table(loaded.target, loaded.drafter, fresh=True, on_measure=lambda: None)
    requests = spread(read_requests(prompts or MT_BENCH), limit)
    tokens = [encode(loaded, request.prompt) for request in requests]
    console.print("decoding with a wide draft to see what is accepted", style="dim")
    sample = wide_searches(loaded, tokens, max_tokens)
    widest = loaded.target.widest(loaded.drafter.max_width)
    widths = [width for width in WIDTHS if width <= widest]
    lengths = [length for length in LENGTHS if length <= (loaded.drafter.max_length or length)]
    predicted = predict_speed(table, sample, widths, lengths, BUDGETS)
    report: dict[str, Any] = {
        **machine(),
        "model": model,
        "widths": widths,
        "lengths": lengths,
        "rows_ms": {n: round(1000 * s, 3) for n, s in table.rows.items()},
        "draft_ms": {
            f"{w}x{n}": round(1000 * table.draft_seconds(w, n), 3) for w in table.first_level for n in lengths
        },
        "predicted_by_shape": predicted.by_shape,
        "predicted_by_nodes": predicted.by_nodes,
        "tokens_per_step": sample.tokens_per_step,
    }
    if not predict:
        report["measured_by_shape"] = _measured(loaded, widths, lengths, tokens, max_tokens)
    report["advice"] = predicted.advice
    _print(report)
    print(json.dumps(report), flush=True)  # before the drawing: whatever happens to that, this is not lost
    if plot is not None:
        draw(report, plot)
        console.print(f"heat maps in {plot}")


def _measured(
    model: Any, widths: list[int], lengths: list[int], prompts: list[list[int]], max_tokens: int
) -> dict[str, float]:
    """Median speed-up over plain decoding of every width x length, all interleaved prompt by prompt.

    Plain decoding, which all are held against, runs before every width, and the median of these runs counts.
    """
    from rich.progress import track

    from redrafter_mlx import Sampling
    from redrafter_mlx.measure.compare import compare, own_arm

    from .console import stderr

    plain = [f"off {width}" for width in widths]
    arms = {}
    for name, width in zip(plain, widths, strict=True):
        arms[name] = own_arm(model, "off", max_tokens, Sampling())
        for shape in (f"{width}x{length}" for length in lengths):
            arms[shape] = own_arm(model, shape, max_tokens, Sampling())
    rounds = compare(arms, prompts, ["all"] * len(prompts))
    *_, result = track(rounds, total=len(prompts), description="every shape", console=stderr())
    speed = {name: [run.tokens_per_second for run in runs] for name, runs in result.runs.items()}
    base = [statistics.median(speed[name][index] for name in plain) for index in range(len(prompts))]

    def over_plain(shape: str) -> float:
        return statistics.median(mine / off for mine, off in zip(speed[shape], base, strict=True) if off)

    return {shape: round(over_plain(shape), 4) for shape in arms if shape not in plain}


def _print(report: dict[str, Any]) -> None:
    from .console import print_table, stderr

    console, widths, lengths = stderr(), report["widths"], report["lengths"]
    plain = report["rows_ms"][1]
    rows = [(str(n), f"{ms:.1f}", f"{ms / plain:.2f}") for n, ms in report["rows_ms"].items()]
    print_table(console, "one target forward over n rows", ("n", "ms", "of a plain step"), rows)
    for key, title in (
        ("measured_by_shape", "measured speed-up, width x length"),
        ("predicted_by_shape", "predicted speed-up, width x length"),
    ):
        if key in report:
            grid = [
                (str(width), *(f"{report[key][f'{width}x{length}']:.2f}" for length in lengths))
                for width in widths
            ]
            print_table(console, title, ("width", *(f"L={length}" for length in lengths)), grid)
    console.print(report["advice"])


def _check_matplotlib() -> None:
    """Check that heat maps can be drawn.

    Raises:
        ValueError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install matplotlib")


def draw(report: dict[str, Any], path: Path) -> None:
    """The heat map of speed-up by width x length, and speed-up by node budget, as one PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from redrafter_mlx.files import new_file

    widths, lengths = report["widths"], report["lengths"]
    key = "measured_by_shape" if "measured_by_shape" in report else "predicted_by_shape"
    values = [[report[key][f"{w}x{length}"] for length in lengths] for w in widths]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    image = left.imshow(values, cmap="RdYlGn", vmin=0.5, vmax=1.5, aspect="auto")
    left.set_xticks(range(len(lengths)), [str(length) for length in lengths])
    left.set_yticks(range(len(widths)), [str(w) for w in widths])
    left.set(xlabel="beam length (root counted)", ylabel="beam width", title=key.replace("_", " "))
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            left.text(x, y, f"{value:.2f}", ha="center", va="center")
    figure.colorbar(image, ax=left, label="speed-up over plain decoding")
    budgets = report["predicted_by_nodes"]
    right.plot([int(n) for n in budgets], list(budgets.values()), marker="o")
    right.axhline(1.0, color="gray", linewidth=0.8)
    right.set(
        xlabel="nodes verified, root included",
        ylabel="predicted speed-up",
        title=f"by node budget, {widths[-1]}x{lengths[-1]}",
    )
    figure.suptitle(f"{report['model']} on {report['chip']}")
    figure.tight_layout()
    with new_file(path) as part:
        figure.savefig(part, dpi=120, format="png")
    pyplot.close(figure)

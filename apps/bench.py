"""`redrafter bench`: speculative against plain decoding and against mlx-lm, on the same prompts and weights.

Every prompt goes through all arms before the next one does. The last line on stdout is one JSON object; the
table before it and all else is on stderr.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from redrafter_mlx.prompts import read_requests

from .options import (
    DEFAULT_MODEL,
    DrafterOption,
    DraftOption,
    LookupOption,
    ModelOption,
    check_draft,
    load_model,
)


@dataclass(frozen=True, slots=True)
class Settings:
    """What is measured."""

    model: str
    drafter: str | None
    lookup: bool
    draft: str
    with_each: bool
    prompts: Path | None
    limit: int | None
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    draft_model: str | None
    context: int | None
    with_mlx_lm: bool
    with_profile: bool


def bench(  # noqa: PLR0913  (typer: one argument per option)
    model: ModelOption = DEFAULT_MODEL,
    drafter: DrafterOption = None,
    lookup: LookupOption = True,
    draft: DraftOption = "auto",
    prompts: Annotated[
        Path | None, typer.Option(help="JSONL of prompts; MT-bench's 80 first turns by default.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only so many prompts, spread over the file.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate per prompt.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option()] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    draft_model: Annotated[
        str | None, typer.Option(help="Smaller target with the same tokenizer, for mlx-lm's speculation.")
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            min=16, help="Lengthen every prompt to about this many tokens with other prompts' text."
        ),
    ] = None,
    each: Annotated[
        bool, typer.Option("--each", help="Also run the drafter and what is looked up each alone.")
    ] = False,
    mlx_lm: Annotated[bool, typer.Option(help="Also run mlx-lm's own stream_generate.")] = True,
    profile: Annotated[
        bool, typer.Option(help="Split a step into draft, verify, accept, keep, host.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON object to this file.")] = None,
) -> None:
    """Measure speculative against plain decoding; the last line is one JSON object."""
    from redrafter_mlx.files import check_writable, new_file

    if out is not None:
        check_writable(out, "--out")
    settings = Settings(
        model, drafter, lookup, check_draft(draft), each, prompts, limit, max_tokens, temperature, top_p, seed,
        draft_model, context, mlx_lm, profile,
    )  # fmt: skip
    line = json.dumps(_run(settings))
    print(line, flush=True)  # first of all: whatever happens to the file, what took minutes is not lost
    if out is not None:
        with new_file(out) as part:
            part.write_text(line + "\n")


def _run(settings: Settings) -> dict[str, Any]:
    from redrafter_mlx import Sampling
    from redrafter_mlx.drafters.lookup import Lookup
    from redrafter_mlx.measure.compare import MT_BENCH, encoded, mlx_lm_arm, own_arm, spread
    from redrafter_mlx.measure.profile import ops_per_step, profile

    sampling = Sampling(temperature=settings.temperature, top_p=settings.top_p, seed=settings.seed)
    model = load_model(settings.model, settings.drafter, settings.lookup)
    if model.drafter is None and model.lookup is None and settings.draft != "off":
        raise ValueError(f"{model.target.name} has no drafter to measure: give one with --drafter")
    requests = spread(read_requests(settings.prompts or MT_BENCH), settings.limit)
    prompts = encoded(model, requests, settings.context)
    arms = {
        "plain": own_arm(model, "off", settings.max_tokens, sampling),
        "drafted": own_arm(model, settings.draft, settings.max_tokens, sampling),
    }
    if settings.with_each:
        if model.drafter is None or model.lookup is None:
            raise ValueError("--each needs a drafter and --lookup: only then are there two to run alone")
        alone = {
            "drafter alone": replace(model, lookup=None, learned=None),
            "lookup alone": replace(model, drafter=None, learned=None, lookup=Lookup()),
        }
        arms |= {name: own_arm(m, settings.draft, settings.max_tokens, sampling) for name, m in alone.items()}
    if settings.with_mlx_lm and model.tokenizer is not None:
        arms["mlx_lm"] = mlx_lm_arm(model, settings.max_tokens, sampling)
    if settings.draft_model is not None:
        smaller = load_model(settings.draft_model, "none").target.model
        arms["mlx_lm_speculative"] = mlx_lm_arm(model, settings.max_tokens, sampling, smaller)
    result = _compare(arms, prompts, [request.category for request in requests])
    report = _report(settings, model, result)
    report["divergences"] = _divergences(model, sampling, prompts, result)
    report["ops_per_step"] = ops_per_step(model, prompts[0], settings.draft, sampling)
    report["plain_ops_per_step"] = ops_per_step(model, prompts[0], "off", sampling)
    if settings.with_profile:
        report["profile_ms"] = profile(model, prompts[0], settings.draft, settings.max_tokens, sampling)
    _print_table(result, report)
    return report


def _compare(arms: Any, prompts: list[list[int]], categories: list[str]) -> Any:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )  # fmt: skip

    from redrafter_mlx.measure.compare import compare

    from .console import stderr

    console = stderr()
    columns: list[ProgressColumn] = [TextColumn("{task.description}"), MofNCompleteColumn()]
    if console.width >= 60:
        columns = [columns[0], BarColumn(), columns[1], TimeRemainingColumn()]
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("prompts", total=len(prompts))
        result = None
        for result in compare(arms, prompts, categories):
            rate = result.ratio("drafted", "plain")[1]
            progress.update(task, advance=1, description=f"speed-up {rate:.2f}")
    return result


def _report(settings: Settings, model: Any, result: Any) -> dict[str, Any]:
    from redrafter_mlx.auto.learned import DEFAULTS
    from redrafter_mlx.measure.machine import machine
    from redrafter_mlx.measure.profile import bytes_per_step

    drafted = _summed(result, "drafted")
    plain = result.runs["plain"]
    others = [name for name in ("plain", "mlx_lm") if name in result.runs]
    base = max(others, key=lambda name: float(result.rate(name)[1]))
    speedup = result.ratio("drafted", base)
    mlx_lm = result.rate("mlx_lm") if "mlx_lm" in result.runs else None
    report = {
        **machine(),
        "model": settings.model,
        "dtype": str(model.target.dtype).removeprefix("mlx.core."),
        "drafter": settings.drafter or ("default" if model.drafter is not None else None),
        "lookup": model.lookup is not None,
        "draft": settings.draft,
        "temperature": settings.temperature,
        "prompts": len(plain),
        "context": settings.context,
        "tokens": sum(len(run.token_ids) for run in plain),
        "plain_tokens_per_second": round(result.rate("plain")[1], 3),
        "tokens_per_second": round(result.rate("drafted")[1], 3),
        "tokens_per_second_quartiles": [round(v, 3) for v in result.rate("drafted")],
        "mlx_lm_tokens_per_second": round(mlx_lm[1], 3) if mlx_lm else None,
        "plain_over_mlx_lm": round(result.ratio("plain", "mlx_lm")[1], 4) if mlx_lm else None,
        "speedup": round(speedup[1], 4),
        "speedup_over": base,
        "speedup_quartiles": [round(v, 4) for v in speedup],
        "speedup_total_time": round(result.total("drafted") / result.total(base), 4),
        "tokens_per_step": round(drafted.tokens_per_step, 4),
        "efficiency": round(speedup[1] / drafted.tokens_per_step, 4),
        "drafted_by_source": drafted.drafted_by_source,
        "accepted_by_source": drafted.accepted_by_source,
        "accepted_by_depth": [round(share, 4) for share in drafted.acceptance],
        "identical": all(
            a.token_ids == b.token_ids for a, b in zip(plain, result.runs["drafted"], strict=True)
        ),
        "rows_per_step": round(1 + drafted.drafted_tokens / drafted.steps, 3),
        "syncs_per_step": round(drafted.syncs / drafted.steps, 4),
        "bytes_per_step": bytes_per_step(model, min(1 + len(drafted.acceptance), max(DEFAULTS.lengths))),
        "peak_memory_bytes": drafted.peak_memory_bytes,
        "plain_peak_memory_bytes": max(run.stats.peak_memory_bytes for run in plain),
        "prefill_seconds": round(drafted.prefill_seconds, 3),
        "categories": {
            name: round(result.ratio("drafted", base, name)[1], 4) for name in sorted(set(result.categories))
        },
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    for name in ("drafter alone", "lookup alone"):
        if name in result.runs:
            report[name] = _alone(result, name, base)
    if "mlx_lm_speculative" in result.runs:
        report["mlx_lm_speculative_tokens_per_second"] = round(result.rate("mlx_lm_speculative")[1], 3)
    return report


def _summed(result: Any, arm: str) -> Any:
    from redrafter_mlx.stats import Stats

    total = Stats()
    for run in result.runs[arm]:
        total.add(run.stats)
    return total


def _alone(result: Any, arm: str, base: str) -> dict[str, Any]:
    """The main figures of one more arm."""
    total = _summed(result, arm)
    return {
        "speedup": round(result.ratio(arm, base)[1], 4),
        "speedup_total_time": round(result.total(arm) / result.total(base), 4),
        "tokens_per_step": round(total.tokens_per_step, 4),
        "rows_per_step": round(1 + total.drafted_tokens / total.steps, 3),
        "identical": all(
            a.token_ids == b.token_ids for a, b in zip(result.runs["plain"], result.runs[arm], strict=True)
        ),
        "categories": {
            name: round(result.ratio(arm, base, name)[1], 4) for name in sorted(set(result.categories))
        },
    }


def _divergences(model: Any, sampling: Any, prompts: list[list[int]], result: Any) -> list[dict[str, Any]]:
    """Where drafted texts part from plain ones: prompt from 0, token, the target's two best tokens, their scores."""
    from redrafter_mlx.measure.divergence import divergence

    found = []
    for index, (prompt, plain, drafted) in enumerate(
        zip(prompts, result.runs["plain"], result.runs["drafted"], strict=True)
    ):
        each = divergence(model.target, sampling, prompt, plain.token_ids, drafted.token_ids)
        if each is not None:
            found.append({"prompt": index, **asdict(each), "is_float32_tie": each.is_tie})
    return found


def _print_table(result: Any, report: dict[str, Any]) -> None:
    from .console import print_table, stderr

    rows = []
    for name in result.runs:
        low, middle, high = result.rate(name)
        ratio = result.ratio(name, report["speedup_over"])[1]
        rows.append((name, f"{middle:.1f}", f"{low:.1f} - {high:.1f}", f"{ratio:.2f}x"))
    console = stderr()
    title = f"{report['model']}, {report['dtype']}, {report['chip']}, draft {report['draft']}"
    header = ("", "tokens/s", "quartiles", f"speed over {report['speedup_over']}")
    print_table(console, title, header, rows)
    differing = report["divergences"]
    ties = sum(each["is_float32_tie"] for each in differing)
    for source, count in report["accepted_by_source"].items():
        rows_of = report["drafted_by_source"][source]
        console.print(f"{source}: {count} of {rows_of} drafted tokens accepted")
    console.print(
        f"tokens per step {report['tokens_per_step']:.2f}, rows {report['rows_per_step']:.1f}, identical: "
        + (f"no ({len(differing)} differ, {ties} by a tie)" if differing else "yes")
    )

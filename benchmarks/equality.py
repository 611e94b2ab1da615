"""The promise, on the real model and through the command: the same text for every draft, at every temperature.

Runs `redrafter generate --prompts F --json` for every setting of sampling and every draft and compares the token ids.
Run: python -m benchmarks.equality [--limit 20] [--max-tokens 128] [--jobs 2]. Exit 1 on any difference.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from redrafter_mlx.measure.compare import MT_BENCH, spread
from redrafter_mlx.measure.machine import machine
from redrafter_mlx.prompts import read_requests

DRAFTS = ("off", "1x4", "3x4", "8x5@16", "auto")
FILTERS = "--top-p 0.9 --top-k 50 --min-p 0.02"
SETTINGS = {
    "T = 0": ["--temperature", "0"],
    "T = 0.7, top-p 0.9, top-k 50, min-p 0.02": ["--temperature", "0.7", *FILTERS.split()],
    "T = 1": ["--temperature", "1"],
}


def run(
    prompts: Path, draft: str, setting: list[str], max_tokens: int, threads: int
) -> list[dict[str, object]]:
    """One object per prompt, as the command prints them."""
    command = [
        sys.executable, "-m", "apps", "generate", "--prompts", str(prompts), "--json", "--seed", "3",
        "--max-tokens", str(max_tokens), "--draft", draft, *setting,
    ]  # fmt: skip
    count = str(threads)
    environment = {
        **os.environ,
        "OPENBLAS_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "OMP_NUM_THREADS": count,
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"error: {' '.join(command)}: {done.stderr.strip()[-500:]}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, default=20)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument(
        "--jobs", type=int, default=2, help="commands at a time, the cores shared out between them"
    )
    arguments = parser.parse_args()
    threads = max(1, (os.cpu_count() or 1) // arguments.jobs)
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.jsonl"
        requests = spread(read_requests(MT_BENCH), arguments.limit)
        prompts.write_text("".join(json.dumps({"prompt": request.prompt}) + "\n" for request in requests))
        pairs = [(name, draft) for name in SETTINGS for draft in DRAFTS]
        with ThreadPoolExecutor(arguments.jobs) as pool:

            def one(pair: tuple[str, str]) -> list[dict[str, object]]:
                found = run(prompts, pair[1], SETTINGS[pair[0]], arguments.max_tokens, threads)
                print(f"{pair[0]}, {pair[1]}: done", file=sys.stderr, flush=True)
                return found

            results = dict(zip(pairs, pool.map(one, pairs), strict=True))
    report: dict[str, object] = {
        **machine(),
        "prompts": arguments.limit,
        "max_tokens": arguments.max_tokens,
    }
    differing = 0
    for name in SETTINGS:
        plain = [answer["token_ids"] for answer in results[name, "off"]]
        for draft in DRAFTS[1:]:
            mine = [answer["token_ids"] for answer in results[name, draft]]
            wrong = sum(a != b for a, b in zip(plain, mine, strict=True))
            stats = [answer["stats"] for answer in results[name, draft]]
            steps = sum(s["steps"] for s in stats)  # type: ignore[index]
            accepted = sum(s["accepted_tokens"] for s in stats)  # type: ignore[index]
            report[f"{name}, {draft}"] = {
                "differing": wrong,
                "tokens_per_step": round(1 + accepted / steps, 4),
            }
            differing += wrong
    report["identical"] = differing == 0
    print(json.dumps(report))
    sys.exit(differing > 0)


if __name__ == "__main__":
    main()

"""A projection, not a measurement: Apple's recorded step times under our choice of nodes.

Step times are the least-squares fit to the CSV files of apple/ml-recurrent-drafter (mlx/experiments/*,
Vicuna-7B fp16,
greedy): milliseconds = base + d (L - 1) + r (n - 2) + cliff [n >= 16] for n >= 2 rows, and the plain step.
The acceptance is that of our shipped drafter on SmolLM2-135M, measured here with the widest draft on
MT-bench first turns. Both inputs are named in the output. Run: python -m benchmarks.projection
"""

from __future__ import annotations

import json
import sys

import redrafter_mlx as rd
from redrafter_mlx.auto.table import CostTable
from redrafter_mlx.generation import encode
from redrafter_mlx.measure.compare import MT_BENCH, spread
from redrafter_mlx.measure.predict import predict, wide_searches
from redrafter_mlx.prompts import read_requests

# chip: plain, base, d, r, cliff (ms); drafter bytes as in Apple's runs, fp16
FITS = {
    "M1 Max": (47.1, 62.5, 3.87, 1.42, 30.2),
    "M2": (158.2, 172.3, 9.68, 2.88, 13.2),
    "M2 Ultra": (25.2, 32.5, 1.53, 0.29, 39.4),
}
WIDTHS, LENGTHS = (1, 2, 3, 4, 8), (2, 3, 4, 5)
BUDGETS = (2, 3, 4, 5, 6, 8, 10, 12, 15, 16, 24, 32)


def table_of(plain: float, base: float, d: float, r: float, cliff: float, share: float) -> CostTable:
    """The fit as a cost table in seconds; `share`: drafter's cost against Apple's fp16 one."""
    rows = {1: plain} | {n: base + r * (n - 2) + cliff * (n >= 16) for n in (2, 15, 16, 64)}
    draft = dict.fromkeys((1, 8), d * share / 1000)
    return CostTable({n: ms / 1000 for n, ms in rows.items()}, draft, draft)


def main() -> None:
    model = rd.load()
    requests = spread(read_requests(MT_BENCH), 16)
    prompts = [encode(model, request.prompt) for request in requests]
    looks = wide_searches(model, prompts, 64)
    out = {
        "projection": True,
        "acceptance_of": model.target.name,
        "tokens_per_step_8x5@32": looks.tokens_per_step,
    }
    for chip, fit in FITS.items():
        for name, share in (("fp16 drafter", 1.0), ("drafter at a tenth of its bytes", 0.1)):
            found = predict(table_of(*fit, share), looks, WIDTHS, LENGTHS, BUDGETS)
            out[f"{chip}, {name}"] = found.advice
            print(f"{chip:9} {name:32} {found.advice}", file=sys.stderr)
    print(json.dumps(out))


if __name__ == "__main__":
    main()

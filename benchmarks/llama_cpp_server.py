"""llama.cpp on this machine's CPU for `benchmarks.llama_cpp`: serves one GGUF until its standard input ends.

Runs under any Python that has `xllamacpp`, which may be another one than redrafter-mlx's; needs nothing else.
Prints one JSON object: {"address": ...}, or {"absent": ...} where `xllamacpp` is not installed.
"""

from __future__ import annotations

import json
import sys


def main(path: str, context: int) -> None:
    """Serve the file at `path` with room for `context` tokens."""
    try:
        import xllamacpp  # type: ignore[import-not-found]
    except ImportError as error:
        print(json.dumps({"absent": str(error)}), flush=True)
        return
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx = context
    params.cpuparams.n_threads = 1  # threads wait for each other by spinning, which a busy machine pays for
    params.cpuparams_batch.n_threads = 1
    params.warmup = False
    params.verbosity = 0
    server = xllamacpp.Server(params)
    print(json.dumps({"address": server.listening_address}), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))

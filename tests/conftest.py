"""What holds for every test: one thread for each library, and the same random numbers on every run."""

from __future__ import annotations

import os

import pytest

# Before mlx loads: the tests' matrices are tiny, and threads would only wait for each other.
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import redrafter_mlx  # noqa: E402, F401  (loads a BLAS before mlx)

# isort: split
import mlx.core as mx  # noqa: E402


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test starts from the same random state, alone or after others."""
    mx.random.seed(0)

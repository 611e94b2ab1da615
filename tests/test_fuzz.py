"""The fuzzer's short form, over what `redrafter` reads; the long one, over all loaders, is `python -m tests.fuzz`."""

from __future__ import annotations

import pytest

from tests.fuzz import WRONG, fuzz
from tests.fuzz_models import LOADING


@pytest.mark.slow
def test_damaged_files_are_refused_or_read() -> None:
    results = list(fuzz(list(LOADING), cases=60, seed=4000))
    assert [result for result in results if result["result"] in WRONG] == []
    assert sum(result["result"] == "refused" for result in results) > 30

"""`python -m tests.cases`: run all cases and print a table of them; further arguments go to pytest (`-k gguf`)."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest


class Table:
    """Collects what pytest reports, by kind of case."""

    def __init__(self) -> None:
        self.kinds: dict[str, Counter[str]] = defaultdict(Counter)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and not (report.failed or report.skipped):
            return
        outcome = "wrong" if report.failed else "right" if report.passed else "skipped"
        name = report.nodeid.split("::")[-1].split("[")[0]
        self.kinds[name.removeprefix("test_").replace("_", " ")][outcome] += 1

    def print(self) -> None:
        width = max(map(len, self.kinds), default=0)
        for kind, outcomes in self.kinds.items():
            print(
                f"{kind:{width}}  {', '.join(f'{count} {name}' for name, count in sorted(outcomes.items()))}"
            )
        total = sum(self.kinds.values(), Counter[str]())
        print(
            f"{len(self.kinds)} kinds: {', '.join(f'{count} {name}' for name, count in sorted(total.items()))}"
        )


def main() -> int:
    table = Table()
    given = [str(Path(__file__).parent), "-q", "--no-header", "-p", "no:terminalreporter", *sys.argv[1:]]
    code = pytest.main(given, plugins=[table])
    table.print()
    return int(code)


if __name__ == "__main__":
    sys.exit(main())

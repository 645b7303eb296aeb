"""The table of the faults: what was broken, how it ended, how soon, and what it left behind."""

from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Row:
    """One fault.

    Attributes:
        rank: on which it happened; None of a job that shall not fail.
        outcome: exit code and first line of what the job said.
        seconds: from the fault to the end of the last process; of a job that shall not fail, its own.
        left: processes, shared memory, files outside the run's folder.
    """

    fault: str
    rank: int | None
    outcome: str
    seconds: float
    left: str


TABLE = pytest.StashKey[list[Row]]()


@pytest.fixture
def table(request: pytest.FixtureRequest) -> list[Row]:
    return request.config.stash.setdefault(TABLE, [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash.get(TABLE, [])
    if not rows:
        return
    terminalreporter.section("faults")
    terminalreporter.line("| fault | on rank | ended with | seconds | left behind |")
    terminalreporter.line("|---|---|---|---|---|")
    for row in rows:
        rank = "" if row.rank is None else row.rank
        terminalreporter.line(f"| {row.fault} | {rank} | {row.outcome} | {row.seconds:.1f} | {row.left} |")
    faults = [row for row in rows if row.rank is not None]
    if faults:
        slowest = max(faults, key=lambda row: row.seconds)
        terminalreporter.line(f"{len(faults)} faults; the slowest, {slowest.fault}, took {slowest.seconds:.1f} s")

"""The fault grid as a table: `pytest -p tests.faults.table -m fault`, which `make faults` runs.

A test carries its row of the matrix as a marker, `@pytest.mark.fault(4, "killed while it saves")`, wherever in the
tree it lies; tests with the same marker are one row. What a test measures it tells by pytest's own `record_property`:
`detected_in` (seconds) and `steps_lost`; a row shows the worst of its tests.
"""

from dataclasses import dataclass, field

import pytest


@dataclass
class Row:
    """One line of the table."""

    detected_in: list[float] = field(default_factory=list)
    steps_lost: list[int] = field(default_factory=list)
    outcomes: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        if "failed" in self.outcomes:
            return "FAILED"
        return "passed" if "passed" in self.outcomes else "skipped"


_of_test: dict[str, tuple[int, str]] = {}
_rows: dict[tuple[int, str], Row] = {}


def pytest_collection_finish(session: pytest.Session) -> None:
    for item in session.items:
        marker = item.get_closest_marker("fault")
        if marker is not None:
            number, fault = marker.args
            _of_test[item.nodeid] = number, fault


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    key = _of_test.get(report.nodeid)
    # Set-up and teardown count only where they fail, or skip the test.
    if key is None or (report.when != "call" and report.passed):
        return
    row = _rows.setdefault(key, Row())
    row.outcomes.append(report.outcome)
    for name, value in report.user_properties:
        if name in ("detected_in", "steps_lost"):
            getattr(row, name).append(value)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    write = terminalreporter.write_line
    width = max((len(fault) for _, fault in _rows), default=5)
    write("")
    write(f" #  {'fault':<{width}}  detected in  steps lost  verdict")
    for (number, fault), row in sorted(_rows.items()):
        seconds = f"{max(row.detected_in):.1f} s" if row.detected_in else "-"
        lost = str(max(row.steps_lost)) if row.steps_lost else "-"
        write(f"{number:2}  {fault:<{width}}  {seconds:>11}  {lost:>10}  {row.verdict}")
    verdicts = [row.verdict for row in _rows.values()]
    skipped = f", {verdicts.count('skipped')} skipped" if "skipped" in verdicts else ""
    write(f"{verdicts.count('passed')} passed, {verdicts.count('FAILED')} failed{skipped}")

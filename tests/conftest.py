"""What holds for every run: in CI nothing is skipped unnoticed, and the time it took is told.

With ``MESHRL_NO_SKIPS=1`` a run with a skip fails, unless its reason is one of :data:`EXPECTED`.
"""

import os
import time

import pytest

NO_SKIPS = "MESHRL_NO_SKIPS"
BUDGET_S = 300
# They say something of versions and processors, not of this machine's setup.
EXPECTED = {
    "of later Gymnasium versions": "tests/unit/wire/test_spaces.py, on Gymnasium 1.2",
    "longdouble is float64 here": "tests/unit/wire/test_spaces.py, where C's long double is a double",
}


class Skips:
    """Gathers what was skipped; lives in the process that reports, not in those of xdist that run."""

    def __init__(self) -> None:
        self.unexpected: list[str] = []
        self._began = time.monotonic()

    def _note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            told = report.longrepr
            reason = str(told[2] if isinstance(told, tuple | list) else told).removeprefix("Skipped: ")
            if reason not in EXPECTED:
                self.unexpected.append(f"{report.nodeid}: {reason}")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._note(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._note(report)

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if self.unexpected and exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.unexpected:
            terminalreporter.section(f"skipped, which {NO_SKIPS} forbids", red=True)
            for line in self.unexpected:
                terminalreporter.line(line)
        seconds = time.monotonic() - self._began
        terminalreporter.line(f"suite: {seconds:.0f} s (budget {BUDGET_S} s)")


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get(NO_SKIPS) and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Skips(), "meshrl-skips")

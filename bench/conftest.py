"""pytest's side of `make bench`: one suite a session, and the results at its end."""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout, installed or not

import pytest

from bench import memory, report
from bench.race import Budget
from bench.suite import ROOT, Suite, write

PART = ROOT / "build" / "bench"  # results of a part of the suite, or of a run that was interrupted
WHOLE = ROOT / "bench" / "results"


def pytest_addoption(parser):
    group = parser.getgroup("make bench")
    group.addoption("--bench-seconds", type=float, default=Budget.seconds,
                    help="of one contender's turns in a race")  # fmt: skip
    group.addoption("--bench-longest", type=float, default=Budget.longest,
                    help="seconds of a call that is still raced")  # fmt: skip
    group.addoption("--bench-quick", action="store_true",
                    help="limits from little work: to try the suite, not to measure")  # fmt: skip
    group.addoption("--bench-out", type=Path, help="folder of the results")


def pytest_configure(config):
    config.bench_suite = None


@pytest.fixture(scope="session")
def suite(request) -> Suite:
    option = request.config.getoption
    budget = Budget(option("bench_seconds"), option("bench_longest"))
    request.config.bench_suite = Suite(budget, quick=option("bench_quick"))
    return request.config.bench_suite


@pytest.fixture(scope="session")
def selected(request) -> dict:
    """Case to the contenders that were chosen with it."""
    found = defaultdict(list)
    for item in request.session.items:
        params = getattr(item, "callspec", None) and item.callspec.params
        if params and "contender" in params:
            found[params["case"]].append(params["contender"])
    return found


def pytest_sessionfinish(session, exitstatus):
    suite = session.config.bench_suite
    if suite is None:
        return
    suite.close()
    if not suite.rows:
        return
    record = suite.record()
    option = session.config.getoption
    whole = not option("keyword") and not option("bench_quick") and exitstatus in (0, 1)
    if whole:
        from bench import stages  # here: it loads everything that a run needs

        record["rows"].append(stages.measure(60))
        record["memory"] = memory.measure()
    folder = option("bench_out") or (WHOLE / record["machine"]["slug"] if whole else PART)
    path = write(record, folder)
    session.config.bench_path = path
    report.main([str(path)])


def pytest_terminal_summary(terminalreporter, config):
    if path := getattr(config, "bench_path", None):
        terminalreporter.write_line(f"results: {path}, page: {path.with_suffix('')}/report.html")

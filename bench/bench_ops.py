"""`make bench`: a test a contender and race, shown and stored by pytest-benchmark.

The first test of a race runs it, all selected contenders by turns in processes of their own; each
test then hands its contender's times to pytest-benchmark, whose clock here is CLOCK.
"""

import pytest

from bench.contenders import contenders, enters
from bench.record import OURS
from bench.suite import curve_cases, plain_cases


class Clock:
    """Stands still but for what is replayed."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def replay(self, benchmark, seconds: list[float]) -> None:
        times = iter(seconds)

        def advance():
            self.now += next(times)

        benchmark.pedantic(advance, rounds=len(seconds), iterations=1)


CLOCK = Clock()
PLAIN = [pytest.param(case, name, id=f"{case}-{name}") for case in plain_cases()
         for name, c in contenders().items() if enters(c, case.op, case.size)]  # fmt: skip


def show(benchmark, suite, case, name) -> None:
    """Hand a row's times over, or say why there are none."""
    row, seconds = suite.rows[case].get(name), suite.times.get((case, name))
    if row is None:
        pytest.skip(f"absent: {name}: {suite.racers[name].absent}")
    if not seconds:
        reason = row["problem"] or f"other results than ours (error {row['error']})"
        (pytest.fail if name == OURS else pytest.skip)(f"not timed: {reason}")
    benchmark.group = str(case)
    benchmark.extra_info.update(row)
    CLOCK.replay(benchmark, seconds)


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("case, contender", PLAIN)
def test_op(case, contender, suite, selected, benchmark):
    suite.race(case, selected[case])
    show(benchmark, suite, case, contender)


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("case", curve_cases(), ids=str)
def test_growth(case, suite, benchmark):
    """Ours and the two fastest others; the test shows ours."""
    suite.race(case, suite.fastest_peers(case.op, case.direction))
    show(benchmark, suite, case, OURS)

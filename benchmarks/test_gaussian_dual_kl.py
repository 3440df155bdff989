"""`gaussian_dual_kl` beside everything else that computes it: `amvl_fast.bench` says what is measured and how.

pytest-benchmark times one test after the other, but two times can only be compared if they were taken in turns. So the
first test of a case measures all its providers interleaved, and each test then hands its own recorded times over: they
are replayed through the timer that pytest-benchmark lets a test choose. What it prints and saves is what was measured.
"""

import pytest

from amvl_fast.bench.clock import RecordedClock
from amvl_fast.bench.gate import GateError

clock = RecordedClock()


@pytest.mark.benchmark(timer=clock.read)
def test_gaussian_dual_kl(benchmark, suite, case, provider):
    if suite.red is not None:
        pytest.skip("the correctness gate is red")
    try:
        measured = suite.results(case)[provider]
    except GateError as error:
        pytest.fail(str(error), pytrace=False)
    benchmark.group = case.name
    benchmark.extra_info.update(measured.row)
    benchmark.pedantic(clock.advance, args=(iter(measured.samples),), rounds=len(measured.samples))

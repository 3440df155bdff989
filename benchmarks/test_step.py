"""The AMVL step beside three passes and the floor, forward and backward: `amvl_fast.bench.steps` says what is measured.

As for the latent op, the first test of a case measures everybody interleaved, and each test hands its recorded times
over to pytest-benchmark. No time is asserted: the terminal's summary says which bars are met.
"""

import pytest

from amvl_fast.bench.clock import RecordedClock
from amvl_fast.bench.gate import GateError

clock = RecordedClock()


@pytest.mark.benchmark(timer=clock.read)
def test_step(benchmark, step_suite, step_case, contestant):
    if step_suite.red is not None:
        pytest.skip("the correctness gate is red")
    try:
        measured = step_suite.results(step_case)[contestant]
    except GateError as error:
        pytest.fail(str(error), pytrace=False)
    benchmark.group = step_case.name
    benchmark.extra_info.update(measured.row)
    benchmark.pedantic(clock.advance, args=(iter(measured.samples),), rounds=len(measured.samples))

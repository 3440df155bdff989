"""Benchmarks run on two threads, the size of machine that their figures are quoted for."""

from __future__ import annotations

import pytest
import torch

from amvl_fast.bench.cases import cases
from amvl_fast.bench.machine import line
from amvl_fast.bench.results import printed
from amvl_fast.bench.step_predictions import predicted_steps
from amvl_fast.bench.step_suite import StepSuite
from amvl_fast.bench.step_tables import printed_steps
from amvl_fast.bench.steps import contestants, step_cases
from amvl_fast.bench.suite import Suite

torch.set_num_threads(2)

SUITE = pytest.StashKey[Suite]()
STEPS = pytest.StashKey[StepSuite]()


def is_quick(config):
    return config.getoption("quick", False)


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="a few small sizes, and nothing compiled")


def pytest_configure(config):
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    # Now and not in the fixture: the machine's load has to be read before anything is measured.
    config.stash[SUITE] = Suite(device, quick=is_quick(config))
    config.stash[STEPS] = StepSuite(device, quick=is_quick(config))


@pytest.fixture(scope="session")
def suite(pytestconfig):
    return pytestconfig.stash[SUITE]


@pytest.fixture(scope="session")
def step_suite(pytestconfig):
    return pytestconfig.stash[STEPS]


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        names = [provider.name for provider in metafunc.config.stash[SUITE].providers]
        grid = [(case, name) for case in cases(quick=is_quick(metafunc.config)) for name in names]
        metafunc.parametrize("case, provider", grid, ids=[f"{case.name}-{name}" for case, name in grid])
    if "step_case" in metafunc.fixturenames:
        grid = [(case, name) for case in step_cases(quick=is_quick(metafunc.config)) for name in contestants(case)]
        metafunc.parametrize("step_case, contestant", grid, ids=[f"{case.name}-{name}" for case, name in grid])


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["amvl_fast"] = config.stash[SUITE].machine


@pytest.hookimpl(wrapper=True)
def pytest_benchmark_group_stats(config):
    """In the order of measurement, which is by size, instead of by name; and nothing at all after a red gate."""
    groups = yield
    if config.stash[SUITE].red is not None or config.stash[STEPS].red is not None:
        return []
    names = [case.name for case in (*cases(quick=is_quick(config)), *step_cases(quick=is_quick(config)))]
    order = {name: place for place, name in enumerate(names)}
    return sorted(groups, key=lambda group: order.get(group[0], len(order)))


def pytest_terminal_summary(terminalreporter, config):
    summarise(terminalreporter, "gaussian_dual_kl", config.stash[SUITE], printed)
    steps = config.stash[STEPS]
    summarise(terminalreporter, "step", steps, lambda rows: printed_steps(rows) + "\n\n" + predicted_steps())


def summarise(terminalreporter, name, suite, text):
    if suite.red is not None:
        terminalreporter.section(f"{name}: refused", red=True)
        terminalreporter.write_line(str(suite.red))
    elif suite.rows:
        terminalreporter.section(name)
        terminalreporter.write_line(line(suite.machine) + "\n")
        terminalreporter.write_line(text(suite.rows))

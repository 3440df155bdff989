"""The benchmark's instrument: that it measures what it says and refuses what is wrong. No time is looked at."""

import csv
import dataclasses
import io
import json
import os
import subprocess
import sys
import weakref
from types import SimpleNamespace

import numpy
import pytest
import torch

from amvl_fast import gaussian_dual_kl
from amvl_fast.bench import cases as cases_module
from amvl_fast.bench import run
from amvl_fast.bench.cases import Case, cases, make_inputs, make_rotation
from amvl_fast.bench.counters import peak_memory
from amvl_fast.bench.gate import GateError, check
from amvl_fast.bench.machine import CHECKOUT, line, machine, slug
from amvl_fast.bench.measure import Budget, interleave, percentile, speedup
from amvl_fast.bench.plots import write_plots
from amvl_fast.bench.providers import Provider, Replay, call, distributions, eager, ours, providers
from amvl_fast.bench.results import COLUMNS, as_csv, as_json, printed
from amvl_fast.bench.suite import Suite, timings
from amvl_fast.cli import main

CPU = torch.device("cpu")
SMALL = Case(2, 64, torch.float32, "full")


def replaced(function, index, change):
    """The provider with one of its outputs changed."""

    def broken(*leaves):
        outputs = list(function(*leaves))
        outputs[index] = change(outputs[index])
        return tuple(outputs)

    return broken


def stale(*leaves):
    torch.manual_seed(0)
    return eager(*leaves)


def unstopped(mean_q, logvar_q, mean_p, logvar_p):
    return gaussian_dual_kl(mean_q, logvar_q, mean_p, logvar_p, stop_gradient=False)


@pytest.fixture
def quick():
    suite = Suite(CPU, quick=True)
    suite.budget = suite.overhead_budget = Budget(seconds=0, min_rounds=3)
    return suite


# The gate


@pytest.mark.parametrize("function", [eager, distributions, ours])
@pytest.mark.parametrize("mode", cases_module.MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gate_lets_every_provider_pass(function, mode, dtype):
    case = Case(3, 64, dtype, mode)
    inputs = make_inputs(case, CPU)
    torch.manual_seed(0)
    with torch.set_grad_enabled(mode != "no-grad"):
        check(case, "provider", call(function, mode, inputs), inputs)


@pytest.mark.parametrize(
    "broken, mode, complaint",
    [
        (replaced(eager, 1, lambda kl: kl * 1.001), "no-grad", "forward_kl is off"),
        (replaced(eager, 2, lambda kl: kl + 1e-2), "full", "reverse_kl is off"),
        (replaced(eager, 0, lambda z: z + 0.5), "forward", "noise in z has mean"),
        (replaced(eager, 0, lambda z: z * float("nan")), "full", "z is not finite"),
        (replaced(eager, 1, lambda kl: kl.double()), "full", "forward_kl is torch.float64"),
        (replaced(eager, 1, lambda kl: kl[:1]), "forward", "forward_kl is torch.float32 [1, 8]"),
        (replaced(eager, 1, lambda kl: kl.detach() + 2 * (kl - kl.detach())), "full", "grad of mean_p is off"),
        (replaced(eager, 2, lambda kl: kl.detach() - (kl - kl.detach())), "backward", "grad of mean_q is off"),
        (unstopped, "backward", "grad of mean_q is off"),
        (stale, "no-grad", "the same z"),
    ],
)
def test_the_gate_goes_red_on_a_wrong_provider(broken, mode, complaint):
    case = dataclasses.replace(SMALL, mode=mode)
    inputs = make_inputs(case, CPU)
    torch.manual_seed(0)
    with torch.set_grad_enabled(mode != "no-grad"), pytest.raises(GateError) as error:
        check(case, "somebody", call(broken, mode, inputs), inputs)
    message = str(error.value)
    assert complaint in message and "somebody" in message and case.name in message and "\n" not in message


def test_after_a_red_gate_nothing_is_reported(quick):
    good = quick.results(SMALL)
    assert list(good) == ["eager", "distributions", "amvl_fast"] and len(quick.rows) == 3
    quick.providers.append(Provider("broken", replaced(eager, 1, lambda kl: 2 * kl)))
    with pytest.raises(GateError, match="broken"):
        quick.results(dataclasses.replace(SMALL, batch=3))
    assert quick.rows == [] and quick.red is not None
    with pytest.raises(GateError, match="broken"):
        quick.results(SMALL)


def test_pytest_refuses_a_red_report(tmp_path):
    (tmp_path / "spoil.py").write_text(
        "from amvl_fast.bench import providers\n"
        "right = providers.ours\n"
        "def wrong(*leaves):\n"
        "    z, forward_kl, reverse_kl = right(*leaves)\n"
        "    return z, forward_kl * (1 + (leaves[0].shape[0] > 1)), reverse_kl\n"
        "providers.ours = wrong\n"
    )
    command = [sys.executable, "-m", "pytest", "benchmarks/test_gaussian_dual_kl.py", "--quick", "-p", "spoil"]
    command += ["-p", "no:cacheprovider", "-k", "full"]
    search = os.pathsep.join([str(tmp_path), str(CHECKOUT)])
    environment = {**os.environ, "PYTHONPATH": search}
    done = subprocess.run(command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout
    assert "amvl_fast on gaussian_dual_kl 64x8x64 float32 full: forward_kl is off" in done.stdout
    # Nor what was measured before it went red, by us or by pytest-benchmark.
    assert "GB/s" not in done.stdout and "StdDev" not in done.stdout
    assert "1 failed, 3 passed, 2 skipped" in done.stdout


# The measurement


def test_everybody_takes_one_turn_a_round_on_the_next_inputs():
    taken = []

    def contestant(name):
        return lambda inputs: taken.append((name, inputs)) or (lambda: ())

    contestants = {name: contestant(name) for name in "abcd"}
    times = interleave(contestants, range(3), lambda timed: (len(taken), 0.0), Budget(seconds=0, min_rounds=40))
    rounds = [[name for name, _ in taken[i : i + 4]] for i in range(0, len(taken), 4)]
    assert len(rounds) == 40 and all(sorted(each) == list("abcd") for each in rounds)
    assert len({tuple(each) for each in rounds}) > 10
    assert [inputs for _, inputs in taken] == [i % 3 for i in range(160)]
    # The first round is warm-up; of every other each has the time that was taken in it.
    for name in "abcd":
        assert [seconds for seconds, _ in times[name]] == [4 * i + rounds[i].index(name) + 1 for i in range(1, 40)]


def test_a_budget_is_kept():
    budget = Budget(seconds=1, max_rounds=100, min_rounds=7, patience=12, fewest_rounds=3)
    assert budget.asks_for_more(2, 1e9) and not budget.asks_for_more(3, 12)
    assert budget.asks_for_more(6, 11) and not budget.asks_for_more(7, 1)
    assert budget.asks_for_more(99, 0.5) and not budget.asks_for_more(100, 0.5)


def test_percentiles_are_numpys():
    values = [5.0, 1.0, 4.0, 2.0, 9.0, 7.0, 7.5]
    for percent in (0, 20, 50, 80, 100):
        assert percentile(values, percent) == pytest.approx(numpy.percentile(values, percent))
    assert percentile([3.0], 80) == 3.0


def test_a_speedup_is_the_median_of_ratios_within_rounds():
    baseline, own = [(2.0, 0), (30.0, 0), (4.0, 0)], [(1.0, 0), (10.0, 0), (4.0, 0)]
    assert speedup(baseline, own) == 2.0


def test_bytes_and_what_follows_from_them():
    case = Case(64, 512, torch.bfloat16, "full")
    assert case.bytes_moved == 14 * 64 * 8 * 512 * 2
    counts = {mode: Case(1, 512, torch.float32, mode).bytes_moved // (8 * 512 * 4) for mode in cases_module.MODES}
    assert counts == {"forward": 5, "no-grad": 5, "backward": 9, "full": 14}
    got = timings(case, [(1e-3, 0)] * 3, [(2e-3, 0)] * 3, copy=2 * case.bytes_moved / 1e-3)
    assert got["gb_per_s"] == pytest.approx(case.bytes_moved / 1e6) and got["speedup"] == 2
    assert got["percent_of_copy"] == pytest.approx(50) and got["p20_ms"] == got["p80_ms"] == 1


def test_inputs_are_leaves_and_rotate(monkeypatch):
    rotation = make_rotation(SMALL, CPU)
    assert len(rotation) == cases_module.MAX_SETS
    assert all(leaf.is_leaf and leaf.requires_grad for inputs in rotation for leaf in inputs.leaves)
    assert not rotation[0].leaves[0].equal(rotation[1].leaves[0])
    monkeypatch.setattr(cases_module, "ROTATED_BYTES", 3 * 4 * SMALL.elements * 4 + 1)
    assert len(make_rotation(SMALL, CPU)) == 4
    monkeypatch.setattr(cases_module, "ROTATED_BYTES", 0)
    assert len(make_rotation(SMALL, CPU)) == 2


def test_backward_alone_leaves_forward_out_of_the_clock():
    called = []

    def function(*leaves):
        called.append(len(leaves))
        return eager(*leaves)

    timed = call(function, "backward", make_inputs(SMALL, CPU))
    assert called == [4]
    assert len(timed()) == 7 and called == [4]


def test_a_replay_keeps_what_its_graph_reads():
    captured = []

    def capture(inputs):
        captured.append(inputs)
        return [SimpleNamespace(replay=lambda: None)], (inputs.leaves[0] + 1,)

    replay = Replay(eager, "full")
    replay.capture = lambda inputs: capture(inputs)
    for seed in range(3):  # each at the address of the last one, were that let go
        inputs = make_inputs(SMALL, CPU, seed=seed)
        expected = inputs.leaves[0] + 1
        assert replay(inputs)()[0].equal(expected) and replay(inputs)()[0].equal(expected)
        leaf = weakref.ref(inputs.leaves[0])
        captured.clear()
        del inputs
        assert leaf() is not None


def test_peak_memory_counts_what_lives_at_once():
    x = torch.ones(2**18)

    def one_after_the_other():
        (x + 1).sum()
        (x + 2).sum()

    def both():
        a, b = x + 1, x + 2
        return a, b

    assert 2**20 <= peak_memory(one_after_the_other, CPU) < 1.1 * 2**20
    assert 2 * 2**20 <= peak_memory(both, CPU) < 2.1 * 2**20


def test_the_suite_is_what_the_design_asks_for():
    full = cases()
    assert len(set(full)) == len(full)
    ladder = [case for case in full if case.d == 512 and case.dtype == torch.float32]
    assert {case.batch for case in ladder} == set(cases_module.LADDER)
    kinds = {(case.batch, case.d, case.dtype) for case in full}
    assert len(full) == len(kinds) * len(cases_module.MODES)
    for batch in cases_module.MIDDLE:
        assert {(batch, 64, torch.float32), (batch, 2048, torch.float32), (batch, 512, torch.bfloat16)} <= kinds
    assert ladder[0].shape == (1, 8, 512) and ladder[-1].shape == (4096, 8, 512)
    assert {case.d for case in full} == {64, 512, 2048}
    assert {case.dtype for case in full} == {torch.float32, torch.bfloat16}
    names = ["eager", "compiled", "distributions", "amvl_fast", "amvl_fast compiled"]
    assert [provider.name for provider in providers(CPU)] == names
    assert [provider.name for provider in providers(torch.device("cuda"))] == [*names, "amvl_fast CUDA graph"]


# The files


def test_rows_become_csv_json_and_a_table(quick, tmp_path):
    quick.results(SMALL)
    quick.results(dataclasses.replace(SMALL, batch=4))
    quick.results(dataclasses.replace(SMALL, mode="forward"))
    rows = list(csv.DictReader(io.StringIO(as_csv(quick.rows))))
    assert tuple(rows[0]) == COLUMNS and len(rows) == 9
    assert all(tuple(row) == COLUMNS for row in quick.rows)
    assert [row["provider"] for row in rows[:3]] == ["eager", "distributions", "amvl_fast"]
    assert rows[0]["launches"] == "" and float(rows[0]["peak_mib"]) > 0 and float(rows[0]["host_us"]) > 0
    record = json.loads(as_json(quick.machine, quick.rows, [], []))
    assert [set(row) for row in record["rows"]] == [set(COLUMNS)] * 9
    text = printed(quick.rows)
    assert text.count("x eager") == 3 + 1 and "(2, 8, 64) float32, full" in text
    paths = write_plots(tmp_path, quick.rows, line(quick.machine))
    assert [path.name for path in paths] == ["time.png", "bandwidth.png", "speedup.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert len(list(tmp_path.iterdir())) == 3


def test_the_machine_is_told_in_one_line():
    info = machine(CPU)
    assert "\n" not in line(info) and torch.__version__.split("+")[0] in line(info)
    assert slug(info | {"device": "Some CPU (R)", "threads": 2}) == "some-cpu-r-2-threads"
    assert slug(info | {"device": "NVIDIA H100", "cuda": "13.0"}) == "nvidia-h100"


# The command


def test_bench_end_to_end(tmp_path, capfd):
    assert main(["bench", "--quick", "--output", str(tmp_path / "new" / "results")]) == 0
    printed_paths = capfd.readouterr().out.splitlines()[-5:]
    names = ["results.json", "results.csv", "time.png", "bandwidth.png", "speedup.png"]
    assert printed_paths == [str(tmp_path / "new" / "results" / name) for name in names]
    assert sorted(path.name for path in (tmp_path / "new" / "results").iterdir()) == sorted(names)
    record = json.loads((tmp_path / "new" / "results" / "results.json").read_text())
    assert len(record["rows"]) == 3 * len(cases(quick=True)) and record["machine"]["threads"] == 2


def test_bench_tells_of_mistakes_in_one_sentence(tmp_path, capsys, monkeypatch):
    def error_of(*arguments):
        assert main(["bench", *arguments]) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("amvl-fast: ") and "\n" not in error
        return error

    (tmp_path / "file").write_text("")
    assert "is not a directory" in error_of("--output", str(tmp_path / "file"))
    assert "is not a directory" in error_of("--compile", "--output", str(tmp_path / "file"))
    monkeypatch.setattr(run.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1))
    assert "did not pass" in error_of("--output", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(run, "find_spec", lambda name: None if name == "pytest_benchmark" else 1)
    assert "pip install amvl-fast[dev]" in error_of()
    monkeypatch.setattr(run, "CHECKOUT", tmp_path)
    assert "checkout" in error_of()


def test_an_interrupted_bench_leaves_what_was_there(quick, tmp_path, monkeypatch):
    quick.results(SMALL)
    benchmarks = [{"extra_info": row} for row in quick.rows]
    record = {"benchmarks": benchmarks, "machine_info": {"amvl_fast": quick.machine}}
    monkeypatch.setattr(run, "run_pytest", lambda *_, **__: record)
    assert main(["bench", "--output", str(tmp_path)]) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "as_csv", interrupt)
    assert main(["bench", "--output", str(tmp_path)]) == 130
    monkeypatch.setattr(run, "run_pytest", lambda *_, **__: interrupt())
    assert main(["bench", "--output", str(tmp_path)]) == 130
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_help_says_what_is_measured_and_where_it_is_written(capsys):
    for arguments in (["--help"], ["bench", "--help"]):
        with pytest.raises(SystemExit):
            main(arguments)
    text = " ".join(capsys.readouterr().out.split())
    assert "measure gaussian_dual_kl" in text
    assert "by default a folder for this machine, and with --compile nowhere" in text


def test_bench_compile_prints_the_report(monkeypatch, capsys, tmp_path):
    asked = []

    def report(directory, *, wide):
        asked.append((directory, wide))
        return "registers"

    monkeypatch.setitem(sys.modules, "amvl_fast.bench.compile_report", SimpleNamespace(report=report))
    assert main(["bench", "--compile"]) == 0
    assert main(["bench", "--compile", "--quick", "--output", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "registers\nregisters\n" and asked == [(None, True), (tmp_path, False)]

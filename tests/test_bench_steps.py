"""The step's benchmark: its gate, tables, bars, files and predictions. No time is looked at."""

import csv
import dataclasses
import io
import json
import os
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from amvl_fast import AMVLConfig, AMVLModel
from amvl_fast.bench import run, step_tables, steps
from amvl_fast.bench.gate import GateError
from amvl_fast.bench.machine import CHECKOUT
from amvl_fast.bench.measure import Budget
from amvl_fast.bench.step_plots import write_scaling
from amvl_fast.bench.step_predictions import (
    QWEN_7B,
    activation_bytes,
    flops,
    made_calls,
    moved_bytes,
    predicted_steps,
    recipe,
    seconds,
)
from amvl_fast.bench.step_suite import StepSuite, check_steps, step_row
from amvl_fast.bench.step_tables import bars, printed_steps, steps_as_csv
from amvl_fast.bench.steps import CASES, FLOOR, OURS, SAMPLES, SCALING, SEVERAL, THREE_PASS, StepCase
from amvl_fast.cost.activations import HALF, prompt_key_bytes
from amvl_fast.cost.flops import Call, Sample, attention_flops, head_flops, linear_flops
from amvl_fast.cost.gpus import GPUS
from amvl_fast.cost.sizes import Decoder
from amvl_fast.cost.timing import SHARE, weight_traffic

CPU = torch.device("cpu")
TINY = StepCase(6, 3, k=2, batch=2)


def rows_of(case, milliseconds, peaks):
    """Rows as they would be if everybody always took the same time."""
    times = {name: [(1e-3 * value, 0.0)] * 3 for name, value in milliseconds.items()}
    return [step_row(case, name, times, 2**20 * peaks.get(name, 1)) for name in times]


@pytest.fixture(scope="module")
def model():
    return steps.make_model(TINY.k)


# The gate


def test_the_gate_lets_the_step_pass(model):
    check_steps(TINY, model, steps.make_steps(model, TINY, CPU))


@pytest.mark.parametrize("what", ["loss", "gradient", "nan"])
def test_the_gate_goes_red_on_a_wrong_step(model, what):
    contestants = steps.make_steps(model, TINY, CPU)
    right = contestants[OURS]

    def wrong():
        loss = right()
        if what == "gradient":
            model.latents.slots.grad *= 1.001
            return loss
        return loss * (1.0001 if what == "loss" else float("nan"))

    contestants[OURS] = wrong
    with pytest.raises(GateError, match="loss" if what == "nan" else what) as error:
        check_steps(TINY, model, contestants)
    assert TINY.name in str(error.value) and "\n" not in str(error.value)


def test_after_a_red_gate_no_step_is_reported(model, monkeypatch):
    suite = StepSuite(CPU, quick=True)
    suite.budget = Budget(seconds=0, min_rounds=3)
    suite._models[TINY.k] = model
    measured = suite.results(TINY)
    assert list(measured) == [OURS, THREE_PASS, FLOOR] and all(len(one.samples) == 3 for one in measured.values())
    assert all(tuple(row) == step_tables.COLUMNS and row["peak_mib"] > 0 for row in suite.rows)

    def red(*_):
        raise GateError("red")

    monkeypatch.setattr("amvl_fast.bench.step_suite.check_steps", red)
    with pytest.raises(GateError):
        suite.results(dataclasses.replace(TINY, batch=1))
    assert suite.rows == [] and suite.red is not None


def test_pytest_refuses_a_red_step(tmp_path):
    (tmp_path / "spoil.py").write_text(
        "from amvl_fast import modeling\n"
        "right = modeling.shared_prefix\n"
        "def wrong(*args, **kwargs):\n"
        "    step = right(*args, **kwargs)\n"
        "    return step._replace(forward_kl=1.01 * step.forward_kl)\n"
        "modeling.shared_prefix = wrong\n"
    )
    command = [sys.executable, "-m", "pytest", "benchmarks/test_step.py", "--quick", "-p", "spoil"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(CHECKOUT)])}
    command += ["-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout
    assert "step: refused" in done.stdout and "its loss is off" in done.stdout
    assert "peak MiB" not in done.stdout and "StdDev" not in done.stdout
    assert "1 failed, 2 skipped" in done.stdout


# Rows, bars and files


def test_the_cases_are_what_the_design_asks_for():
    shapes = [(case.prompt, case.answer, case.batch) for case in CASES]
    assert shapes == [(64, 8, 8), (256, 16, 4), (1024, 32, 2), (2048, 128, 1)]
    assert [case.prompt for case in SCALING] == [64, 128, 256, 512, 1024, 2048, 4096]
    assert steps.step_cases() == [*CASES, *SCALING] and len(set(steps.step_cases())) == 11
    assert [case for case in steps.step_cases() if SEVERAL in steps.contestants(case)] == [SAMPLES]
    assert StepCase(100, 10, k=3).unique_rows == 100 + 3 + 2 * 13


def test_ratios_are_medians_within_rounds():
    times = {
        OURS: [(1.0, 0), (10.0, 0), (4.0, 0)],
        THREE_PASS: [(2.0, 0), (30.0, 0), (4.0, 0)],
        FLOOR: [(0.5, 0), (10.0, 0), (1.0, 0)],
        SEVERAL: [(1.5, 0), (11.0, 0), (8.0, 0)],
    }
    row = step_row(SAMPLES, OURS, times, 3 * 2**20)
    assert (row["speedup"], row["over_floor"], row["over_one_sample"], row["peak_mib"]) == (2, 2, None, 3)
    assert step_row(SAMPLES, SEVERAL, times, 0)["over_one_sample"] == 1.5
    assert row["p50_ms"] == 4000 and row["rounds"] == 3


@pytest.mark.parametrize("ours, floor, peak, met", [(10, 10, 5, [1, 1, 1, 1]), (13, 12, 5.1, [0, 0, 1, 0])])
def test_bars_stand_beside_their_figures(ours, floor, peak, met):
    milliseconds = {OURS: ours, THREE_PASS: 29, FLOOR: floor, SEVERAL: 13}
    rows = rows_of(SAMPLES, milliseconds, {OURS: peak, THREE_PASS: 5})
    assert [bar.met for bar in bars(rows)] == [bool(one) for one in met]
    text = printed_steps(rows)
    assert text.count("NOT MET") == met.count(0) and SAMPLES.name in text
    assert f"times faster than three_pass: {29 / ours:.4g}, at least 2.8" in text
    assert f"time over the floor's: {ours / floor:.4g}, at most 1.05" in text
    assert f"peak MiB, against three_pass: {peak:.4g}, at most 5" in text
    assert "at most 1.3" in text


def test_a_case_without_bars_on_time_has_one_on_memory():
    rows = rows_of(SCALING[0], {OURS: 1, THREE_PASS: 2, FLOOR: 1}, {OURS: 2})
    (bar,) = bars(rows)
    assert not bar.met and "peak" in bar.what


@pytest.fixture
def ladder():
    milliseconds = {OURS: 12, THREE_PASS: 30, FLOOR: 11}
    return [row for case in (*CASES, *SCALING) for row in rows_of(case, milliseconds, {})]


def test_the_scaling_is_drawn_where_it_was_measured(ladder, tmp_path):
    path = tmp_path / "scaling.png"
    assert write_scaling(path, ladder, "machine") == [path] and path.read_bytes().startswith(b"\x89PNG")
    off = [row for row in ladder if row["answer"] != SCALING[0].answer]
    assert write_scaling(tmp_path / "none.png", off, "machine") == [] and not (tmp_path / "none.png").exists()


def test_bench_writes_the_steps(ladder, tmp_path, monkeypatch):
    other = {"extra_info": {}, "group": "g", "name": "n", "stats": {"median": 1e-3, "rounds": 2}}
    record = {
        "benchmarks": [*({"extra_info": row} for row in ladder), other],
        "machine_info": {"amvl_fast": StepSuite(CPU, quick=True).machine},
    }
    monkeypatch.setattr(run, "run_pytest", lambda *_, **__: record)
    monkeypatch.setattr("amvl_fast.bench.plots.write_plots", lambda *_: [])
    paths = run.bench(tmp_path)
    assert [path.name for path in paths] == ["results.json", "results.csv", "steps.csv", "scaling.png"]
    written = json.loads(paths[0].read_text())
    assert written["rows"] == [] and len(written["steps"]) == len(ladder) and len(written["others"]) == 1
    assert written["steps"][0]["p50_ms"] == 12 and written["steps"][0]["speedup"] == 2.5
    rows = list(csv.DictReader(io.StringIO(steps_as_csv(ladder))))
    assert tuple(rows[0]) == step_tables.COLUMNS and len(rows) == len(ladder)
    assert rows == list(csv.DictReader(io.StringIO(paths[2].read_text())))


# Predictions


def small_model():
    """The benchmark's model as it is, without the end of latents, which predictions leave out, and its sizes."""
    backbone = steps.make_model(2).backbone
    backbone.set_attn_implementation("eager")  # whose products of matrices the counter sees
    config = backbone.config.text_config
    sizes = (config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.num_attention_heads)
    decoder = Decoder(*sizes, config.num_key_value_heads, config.hidden_size // sizes[3], config.vocab_size)
    return AMVLModel.from_backbone(backbone, AMVLConfig(num_latents=2, latent_dim=16, end_of_latents=False)), decoder


@pytest.mark.parametrize("provider", [OURS, THREE_PASS, FLOOR])
def test_operations_are_those_that_are_counted(provider):
    model, decoder = small_model()
    step = steps.make_steps(model, TINY, CPU)[provider]
    with FlopCounterMode(display=False) as counter:
        step()
    # Eager attention computes what it then masks, and makes nothing again in the backward pass.
    eager = dataclasses.replace(recipe(OURS if provider == FLOOR else provider), attention="eager")
    expected = head_flops(decoder, Sample(TINY.prompt, TINY.answer), eager).total
    for call in made_calls(provider, TINY):
        expected += linear_flops(decoder, call, eager).total + attention_flops(decoder, call, eager).total
    if provider != FLOOR:  # two heads with mean and log-variance each, and the projection
        expected += 6 * 5 * TINY.k * decoder.hidden * model.config.latent_dim
    assert counter.get_total_flops() == TINY.batch * expected


def test_qwen_is_as_large_as_published():
    assert QWEN_7B.layer_weights == 2 * 3584**2 + 2 * 3584 * 512 + 3 * 3584 * 18944
    assert QWEN_7B.weights == 28 * QWEN_7B.layer_weights + 3584 * 152_064
    assert f"{QWEN_7B.weights / 1e9:.2f}" == "7.07"
    assert prompt_key_bytes(QWEN_7B, Sample(1000, 1), HALF) == 28 * 2 * 512 * 2 * 1000


def test_queries_read_their_prompt_and_half_of_their_branch():
    assert Call(0, (10,)).pairs == 50 and Call(7, (2, 4)).pairs == 2 * 8 + 4 * 9
    for case in (StepCase(100, 10), StepCase(1, 1)):
        rows = {name: sum(call.rows for call in made_calls(name, case)) for name in (OURS, FLOOR, THREE_PASS)}
        assert rows[OURS] == rows[FLOOR] == case.unique_rows and rows[THREE_PASS] - rows[FLOOR] == 2 * case.prompt


def test_time_is_the_slower_of_operations_and_bytes():
    long, short = StepCase(4096, 32, batch=8), StepCase(1, 1, k=1)
    compute = flops(QWEN_7B, OURS, long) / (SHARE * GPUS["H100 SXM"].matrix_flops)
    assert seconds(QWEN_7B, OURS, long, "H100 SXM") == compute == seconds(QWEN_7B, OURS, long, "H200 SXM")
    assert seconds(QWEN_7B, OURS, short, "H200 SXM") == moved_bytes(QWEN_7B, OURS, short) / 4800e9
    # Three calls of the decoder read and write more than one, and three passes keep three prompts.
    weights = [weight_traffic(QWEN_7B, made, recipe(OURS)) for made in (3, 1)]
    assert weights[0] - weights[1] == 28 * QWEN_7B.layer_weights * (15 - 3)
    activations = 2 * activation_bytes(QWEN_7B, OURS, short)
    assert moved_bytes(QWEN_7B, OURS, short) == 2 * weights[0] + activations
    assert activation_bytes(QWEN_7B, THREE_PASS, long) > 2.9 * activation_bytes(QWEN_7B, OURS, long)


def test_the_predicted_table_says_that_it_is_one():
    text = predicted_steps()
    assert text.startswith("Predicted, not measured") and "no vision tower" in text
    table = text.split("\n\n")[0].splitlines()[1:]
    assert len(table) == 1 + 6 * 3 and all(f"{name} ms" in table[0] for name in ("A100", "H100", "H200", "B200"))

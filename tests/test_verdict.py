"""What a report says of the latents and of accuracy, from fabricated numbers."""

import pytest

from amvl_fast.report.evaluated import EvaluatedRun
from amvl_fast.report.page import table
from amvl_fast.report.verdict import difference, judge, wilson


def evaluated(tmp_path, accuracy, *, name="run", rows=1000, **metrics):
    hits = round(accuracy * rows)
    predictions = [{"correct": i < hits} for i in range(rows)]
    record = {"metrics": {"accuracy": accuracy, "nll": 0.3, **metrics}, "latents": {"num_latents": 2, "latent_dim": 4}}
    record["selection"] = {"rows": rows, "drawn_with_seed": None}
    return EvaluatedRun(tmp_path / name, record, predictions, [])


HEALTHY = {
    "nll_posterior": 0.30,
    "nll_prior": 0.33,
    "leakage": 0.03,
    "forward_kl_per_slot": [0.2, 0.3],
    "reverse_kl_per_slot": [0.2, 0.4],
    "active_units_posterior": [4, 2],
    "active_units_prior": [3, 2],
    "swap_cost": 0.2,
    "swap_nll_own": 0.33,
    "swap_nll_other": 0.53,
    "swap_rows": 1000,
}
GAP = {"nll_prior": 0.5, "leakage": 0.2}


@pytest.mark.parametrize(
    ("changes", "accuracy", "baseline", "expected"),
    [
        ({}, 0.8, 0.8, "🟢 in use"),
        ({}, 0.8, None, "🟢 in use"),
        ({}, 0.7, 0.8, "🟡 in use, at a cost"),
        ({"active_units_posterior": [0, 0]}, 0.8, 0.8, "🔴 collapsed"),
        ({"forward_kl_per_slot": [0.004, 0.005]}, 0.8, 0.8, "🔴 collapsed"),
        ({"forward_kl_per_slot": [0.006, 0.006]}, 0.8, 0.8, "🟢 in use"),
        (GAP, 0.5, 0.8, "🔴 leaking"),
        (GAP, 0.79, 0.8, "🔴 leaking"),  # paired: ten rows lost and none won is clear
        (GAP, 0.8, 0.8, "🟡 in use, with a gap"),
        (GAP, 0.8, None, "🟡 perhaps leaking"),
        ({"leakage": 0.09}, 0.8, None, "🟢 in use"),
        ({"active_units_prior": [0, 0]}, 0.8, 0.8, "🟡 idle at inference"),
        ({"swap_cost": 0.009}, 0.8, 0.8, "🔴 ignored"),
        ({"forward_kl_per_slot": [float("nan"), 1.0]}, 0.8, 0.8, "🔴 broken"),
    ],
)
def test_the_verdict(tmp_path, changes, accuracy, baseline, expected):
    other = None if baseline is None else evaluated(tmp_path, baseline, name="plain")
    verdict = judge(evaluated(tmp_path, accuracy, **{**HEALTHY, **changes}), other)
    assert f"{verdict.mark} {verdict.headline}" == expected.replace(" ", " Latents: ", 1)
    words = " ".join(verdict.sentences)
    for threshold in ("below 0.01", "over 0.1 more", "none in the posterior"):
        assert threshold in words
    assert ("not compared" in words) == (baseline is None)


def test_a_verdict_with_nothing_to_swap_claims_nothing(tmp_path):
    metrics = {name: value for name, value in HEALTHY.items() if not name.startswith("swap")}
    assert judge(evaluated(tmp_path, 0.8, **metrics)).headline == "Latents: untested"


def test_intervals():
    # Wilson, from Newcombe 1998, table I: 81 of 263 and 0 of 20.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    delta, low, high = difference([True, True, False, False], [True, False, True, False])
    assert delta == 0
    assert low == -high
    # One row proves nothing, whatever the naive variance says.
    assert difference([False], [True])[2] > 0
    assert difference([False] * 50, [True] * 50)[2] < 0


def test_the_table_leaves_empty_what_a_run_does_not_have(tmp_path):
    lines = table([evaluated(tmp_path, 0.8, **HEALTHY), evaluated(tmp_path, 0.75, name="plain")]).splitlines()
    assert lines[0] == "| all 1,000 test rows | run | plain (baseline) |"
    assert lines[2] == "| accuracy, 95% interval | **80.0% (77.4 to 82.4)** | **75.0% (72.2 to 77.6)** |"
    assert "| nats per answer token, no latents |  | 0.300 |" in lines
    assert "| forward KL(q‖p), nats per row | 0.50 |  |" in lines
    assert "| active units of 8, posterior | 6 |  |" in lines

"""A run's evaluation and report: what is on disk afterwards, the verdict, and what is refused."""

import json
import re
import sys

import datasets
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from amvl_fast import AMVLConfig, AMVLModel
from amvl_fast.data import ChatCollator, ChatDataset
from amvl_fast.errors import AMVLError
from amvl_fast.report import evaluate_run
from amvl_fast.report.answers import choose
from amvl_fast.report.evaluated import EvaluatedRun, read_evaluated, read_state
from amvl_fast.report.page import table
from amvl_fast.report.swap import swap_latents
from amvl_fast.report.verdict import difference, judge, wilson
from amvl_fast.tiny import build_tiny_base

SIZES = dict(hidden_size=32, num_layers=1, num_heads=4, num_key_value_heads=2, vision_hidden_size=32, vision_depth=1)
COLOURS = ("red", "green", "blue")
FIGURES = ["nll.png", "kl.png", "accuracy.png", "kinds.png", "examples.png"]


@pytest.fixture(scope="module", autouse=True)
def datasets_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """`base` and `test.jsonl`, whose texts try what matplotlib and JSON treat specially."""
    root = tmp_path_factory.mktemp("report")
    build_tiny_base(root / "base", ["what colour is it?", *COLOURS], **SIZES)
    lines = []
    for i in range(9):
        Image.new("RGB", (32, 48), COLOURS[i % 3]).save(root / f"{i}.png")
        words = {"type": "text", "text": f"what colour is it for $5 and ${i}_{{?"}
        user = {"role": "user", "content": [{"type": "image"}, words]}
        messages = [user, {"role": "assistant", "content": COLOURS[i % 3]}]
        lines.append(json.dumps({"messages": messages, "images": [f"{i}.png"], "kind": ("odd", "even")[i % 2]}))
    (root / "test.jsonl").write_text("\n".join(lines))
    return root


def log(latents=True):
    """A Trainer's log: a zero KL and a jump of a KL over orders of magnitude included."""
    entries = []
    for step, kl in ((2, 100.0), (4, 1e-7), (6, 0.0)):
        training = {
            "loss": 1.0,
            "ntp_loss": 1.0,
            "forward_kl": kl,
            "reverse_kl": 2 * kl,
            "beta": 0.1 * step,
            "gamma": 0,
        }
        nll = {"eval_nll_posterior": 0.5, "eval_nll_prior": 1 / step} if latents else {"eval_nll": 1 / step}
        entries += [{"step": step, **(training if latents else {"loss": 1.0})}]
        entries += [{"step": step, "eval_accuracy": 0.1 * step, **nll}]
    return entries


def make_run(root, name, *, latents=True, where="", history=True, test="test.jsonl"):
    run = root / name
    target = run / where
    if latents:
        torch.manual_seed(0)
        config = AMVLConfig(num_latents=2, latent_dim=4, latent_temperature=0.5)
        model = AMVLModel.from_backbone(str(root / "base"), config)
    else:
        model = AutoModelForImageTextToText.from_pretrained(root / "base")
    model.save_pretrained(target)
    AutoProcessor.from_pretrained(root / "base").save_pretrained(target)
    state = {"global_step": 6, "log_history": log(latents) if history else []}
    (target / "trainer_state.json").write_text(json.dumps(state))
    data = {"test": str(root / test) if test else None, "image_root": None, "max_new_tokens": 3}
    (run / "amvl_run.json").write_text(json.dumps({"data": data}))
    return run


def pictures(report):
    """The pictures that a report shows, each opened and found to be one with something on it."""
    names = re.findall(r"!\[\w+\]\(report/(\w+\.png)\)", report.read_text())
    for name in names:
        with Image.open(report.parent / "report" / name) as image:
            image.load()
            assert image.format == "PNG"
            assert 600 <= image.width <= 2000
            assert 300 <= image.height <= 2000
            ink = sum(image.convert("L").histogram()[:200])
            assert ink > 0.002 * image.width * image.height, f"{name} is all but blank"
    return names


@pytest.fixture(scope="module")
def both(root):
    plain = make_run(root, "plain", latents=False)
    evaluate_run(plain, batch_size=4)
    run = make_run(root, "amvl")
    return plain, run, evaluate_run(run, baseline=plain, batch_size=4)


def test_the_evaluation_holds_the_metrics_and_what_made_them(both):
    _, run, report = both
    assert report == run / "report.md"
    record = json.loads((run / "evaluation.json").read_text())
    predictions = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert [p["row"] for p in predictions] == list(range(9))
    assert record["metrics"]["rows"] == 9
    assert record["metrics"]["accuracy"] == sum(p["correct"] for p in predictions) / 9
    assert len(record["metrics"]["forward_kl_per_slot"]) == 2
    assert record["metrics"]["swap_rows"] == 8  # the ninth is a batch by itself
    assert record["latents"]["latent_temperature"] == 0.5
    assert (record["seed"], record["batch_size"], record["step"], record["complete"]) == (0, 4, 6, True)
    assert record["selection"]["drawn_with_seed"] is None
    assert set(record["versions"]) == {"amvl_fast", "torch", "transformers", "python"}
    assert "--baseline" in record["command"]
    assert "--rows" not in record["command"]
    assert not list(run.rglob("*.unfinished"))


def test_the_report_shows_every_picture_and_both_runs(both):
    _, run, report = both
    assert pictures(report) == FIGURES
    text = report.read_text()
    assert text.startswith("# amvl: ")
    assert "| amvl | plain (baseline) |" in text
    assert judge(read_evaluated(run)).headline in text
    assert "torch " + torch.__version__ in text


def test_a_run_without_latents_leaves_out_what_makes_no_sense(both):
    plain = both[0]
    assert pictures(plain / "report.md") == ["nll.png", "accuracy.png", "kinds.png", "examples.png"]
    assert "Latents: none" in (plain / "report.md").read_text()
    assert "swap_cost" not in read_evaluated(plain).metrics


def test_a_checkpoint_without_evaluations_while_training(root):
    run = make_run(root, "unfinished", where="checkpoint-6", history=False)
    (run / "report").mkdir()
    (run / "report" / "nll.png").write_text("of an earlier evaluation")
    report = evaluate_run(run, rows=4, seed=3, latent_temperature=0.0)
    assert pictures(report) == ["kl.png", "kinds.png", "examples.png"]
    assert not (run / "report" / "nll.png").exists()
    record = read_evaluated(run).record
    assert record["checkpoint"] == "checkpoint-6"
    assert record["selection"] == {"test": str(root / "test.jsonl"), "rows": 4, "drawn_with_seed": 3}
    assert record["latents"]["latent_temperature"] == 0.0
    assert "--rows 4" in record["command"]
    assert "these are the numbers of checkpoint-6" in report.read_text()


def test_the_log_of_a_checkpoint_counts_as_the_runs(root, tmp_path):
    assert read_state(tmp_path) == {}
    run = make_run(root, "resumable", where="checkpoint-6")
    assert len(read_state(run)["log_history"]) == 6


def test_what_stands_in_the_way_is_said_before_the_evaluation(root, both, monkeypatch):
    plain, run, _ = both
    monkeypatch.setattr("amvl_fast.report.evaluate.evaluate", lambda *a, **k: pytest.fail("evaluated all the same"))
    fresh = make_run(root, "fresh", latents=False)
    with pytest.raises(AMVLError, match=rf"run `amvl-fast evaluate {re.escape(str(fresh))}` first"):
        evaluate_run(run, baseline=fresh)
    with pytest.raises(AMVLError, match="all 9 test rows, not on 4 test rows drawn with seed 0"):
        evaluate_run(run, baseline=plain, rows=4)
    with pytest.raises(AMVLError, match=r"set data\.test"):
        evaluate_run(make_run(root, "untested", latents=False, test=None))
    with pytest.raises(AMVLError, match="rows is 0"):
        evaluate_run(run, rows=0)
    with pytest.raises(AMVLError, match="batch_size is 0"):
        evaluate_run(run, batch_size=0)


def test_without_matplotlib_the_evaluation_is_written_all_the_same(root, monkeypatch):
    run = make_run(root, "bare", latents=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(AMVLError, match=r"pip install amvl-fast\[report\]"):
        evaluate_run(run, rows=3)
    assert len(read_evaluated(run).predictions) == 3
    assert not (run / "report.md").exists()


def test_a_swap_costs_something_only_if_the_decoder_reads_the_latents(root, both):
    model = AMVLModel.from_pretrained(both[1]).eval()
    rows = ChatDataset(root / "test.jsonl")
    collator = ChatCollator(AutoProcessor.from_pretrained(root / "base"))
    found = swap_latents(model, collator, rows, batch_size=9, seed=0)
    assert abs(found["swap_cost"]) > 1e-6
    assert found["swap_cost"] == pytest.approx(found["swap_nll_other"] - found["swap_nll_own"])
    assert swap_latents(model, collator, rows, batch_size=9, seed=0) == found  # nothing stays swapped
    model.latents.projection.register_forward_hook(lambda module, args, out: torch.zeros_like(out))
    assert swap_latents(model, collator, rows, batch_size=9, seed=0)["swap_cost"] == pytest.approx(0, abs=1e-6)


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


def test_examples_hold_wrong_and_right_answers_and_repeat():
    predictions = [{"correct": i % 10 != 0} for i in range(200)]
    chosen = choose(predictions, seed=1)
    assert chosen == choose(predictions, seed=1)
    assert chosen != choose(predictions, seed=2)
    assert len(set(chosen)) == 12
    assert sum(not predictions[i]["correct"] for i in chosen) == 4
    assert sorted(choose(predictions[:5], seed=0)) == [0, 1, 2, 3, 4]
    assert len(choose([{"correct": False}] * 30, seed=0)) == 12

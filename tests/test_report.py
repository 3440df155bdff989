"""A run's evaluation and report: what is on disk afterwards, and what is refused."""

import json
import re
import sys

import datasets
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from amvl_fast import AMVLConfig, AMVLModel
from amvl_fast.data import ChatCollator, ChatDataset
from amvl_fast.errors import AMVLError
from amvl_fast.report import evaluate_run
from amvl_fast.report.answers import choose
from amvl_fast.report.evaluated import read_evaluated, read_state
from amvl_fast.report.plots import draw_kl, kl_series
from amvl_fast.report.swap import swap_latents
from amvl_fast.report.verdict import judge
from amvl_fast.tiny import build_tiny_base
from amvl_fast.training.checkpoints import write_manifest

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
        words = {"type": "text", "text": f"is it $_{{$ {i}?"}
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
        nll = {"eval_nll_posterior": 0.8 / step, "eval_nll_prior": 1 / step} if latents else {"eval_nll": 1 / step}
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
    if where:
        write_manifest(target, {})
    (run / "amvl_run.json").write_text(json.dumps({"data": data, "training": {"per_device_eval_batch_size": 4}}))
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


def test_kls_are_drawn_in_nats_per_row_and_zeros_on_the_floor(both):
    curves = [kl_series(read_evaluated(both[1]), name) for name in ("forward_kl", "reverse_kl")]
    assert curves[0] == ([2, 4, 6], pytest.approx([800.0, 8e-7, 0.0]))  # logged as a mean over 2 x 4 elements
    axes = Figure().subplots()
    draw_kl(axes, curves)
    assert [list(line.get_ydata()) for line in axes.lines[:2]] == [[800, 1e-4, 1e-4], [1600, 1e-4, 1e-4]]
    assert axes.get_ylim()[0] < 1e-4
    assert "KL(q‖p)  below 0.0001" in [text.get_text() for text in axes.texts]


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


def test_examples_hold_wrong_and_right_answers_and_repeat():
    predictions = [{"correct": i % 10 != 0} for i in range(200)]
    chosen = choose(predictions, seed=1)
    assert chosen == choose(predictions, seed=1)
    assert chosen != choose(predictions, seed=2)
    assert len(set(chosen)) == 12
    assert sum(not predictions[i]["correct"] for i in chosen) == 4
    assert sorted(choose(predictions[:5], seed=0)) == [0, 1, 2, 3, 4]
    assert len(choose([{"correct": False}] * 30, seed=0)) == 12

"""The command line: help without waiting, errors in one line, and what doctor and generate print."""

import sys

import pytest
import torch
from PIL import Image

from amvl_fast import AMVLConfig, AMVLModel
from amvl_fast.cli import ENGINES, main, parser
from amvl_fast.cost import engines
from amvl_fast.data import ChatCollator, ChatDataset
from amvl_fast.doctor import report
from amvl_fast.errors import AMVLError
from amvl_fast.evaluation import answer
from amvl_fast.ops import backend_status
from amvl_fast.tiny import build_tiny_base

SIZES = dict(hidden_size=32, num_layers=1, num_heads=4, num_key_value_heads=2, vision_hidden_size=32, vision_depth=1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    from transformers import AutoProcessor

    directory = tmp_path_factory.mktemp("run")
    base = build_tiny_base(tmp_path_factory.mktemp("base"), ["what colour is it?", "red"], **SIZES)
    torch.manual_seed(0)
    AMVLModel.from_backbone(str(base), AMVLConfig(num_latents=2, latent_dim=4)).save_pretrained(directory)
    AutoProcessor.from_pretrained(base).save_pretrained(directory)
    return directory


def test_help_names_every_verb(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert all(verb in printed for verb in ("train", "evaluate", "generate", "plan", "bench", "doctor"))


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}\n')
    monkeypatch.setitem(sys.modules, "datasets", None)  # what Python does for a module that is not there
    with pytest.raises(AMVLError, match=r"pip install amvl-fast\[train\]"):
        ChatDataset(rows)


@pytest.mark.parametrize(
    "arguments",
    [
        ["evaluate", "run", "--rows"],
        ["evaluate", "run", "--batch-size"],
        ["generate", "run", "--image", "x.png", "--question", "what?", "--max-new-tokens"],
    ],
)
@pytest.mark.parametrize("value", ["0", "-3", "2.5", "two"])
def test_counts_must_be_positive(arguments, value, capsys):
    with pytest.raises(SystemExit) as end:
        main([*arguments[:-1], f"{arguments[-1]}={value}"])
    assert end.value.code == 2
    assert f"argument {arguments[-1]}: {value!r} is not a whole number of at least 1" in capsys.readouterr().err
    name = arguments[-1].removeprefix("--").replace("-", "_")
    assert getattr(parser().parse_args([*arguments, "3"]), name) == 3


def test_the_batch_size_is_left_to_the_evaluation():
    assert parser().parse_args(["evaluate", "run"]).batch_size is None


def test_generate_prints_the_answer_of_the_run(run, tmp_path, capsys):
    from amvl_fast.training import load_run

    image = Image.new("RGB", (32, 32), "red")
    image.save(tmp_path / "red.png")
    arguments = [
        "generate",
        str(run),
        "--image",
        str(tmp_path / "red.png"),
        "--question",
        "what colour is it?",
    ]
    assert main([*arguments, "--max-new-tokens", "4", "--seed", "3"]) == 0
    printed = capsys.readouterr().out.strip()
    model, processor, _ = load_run(run)
    content = [{"type": "image"}, {"type": "text", "text": "what colour is it?"}]
    row = {"messages": [{"role": "user", "content": content}], "images": [image]}
    assert printed == answer(model, ChatCollator(processor), [row], seed=3, max_new_tokens=4)[0]


def test_generate_tells_of_a_missing_image_and_a_missing_run(run, tmp_path, capsys):
    (tmp_path / "text.png").write_text("no picture")
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    for image, where, words in (
        (tmp_path / "gone.png", run, "gone.png"),
        (tmp_path / "text.png", run, "text.png"),
        (tmp_path / "red.png", tmp_path, "holds no trained model"),
    ):
        assert main(["generate", str(where), "--image", str(image), "--question", "what?"]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("amvl-fast: ") and words in error


def test_doctor_names_versions_devices_and_every_backend(capsys):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert torch.__version__.split("+")[0] in printed
    for name, reason in backend_status().items():
        line = next(line for line in printed.splitlines() if line.startswith(f"backend {name}"))
        assert ("available" if reason is None else reason) in line
    assert printed.strip() == report().strip()


def test_plan_reads_a_configuration_and_predicts(tmp_path, capsys):
    base = build_tiny_base(tmp_path / "base", ["what colour is it?", "red"], **SIZES)
    config = tmp_path / "config.yaml"
    config.write_text(
        f"model: {{backbone: {base}}}\ndata: {{train: nowhere.jsonl}}\ntraining: {{output_dir: x, max_steps: 1}}\n"
    )
    lengths = ["--prompt-tokens", "100", "--answer-tokens", "10"]
    assert main(["plan", str(config), "objective.gamma=0.1", "--gpu", "h100", "--count", "8", *lengths]) == 0
    printed = capsys.readouterr().out
    assert "8 x H100 SXM, ddp" in printed and "shared_prefix" in printed and "three_pass" in printed
    assert main(["plan", str(config), "--gpu", "h100"]) == 2
    assert "give --prompt-tokens" in capsys.readouterr().err
    assert ENGINES == engines.ENGINES

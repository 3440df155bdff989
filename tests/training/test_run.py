"""Whole runs: they repeat, resume, stop on request, and leave whole checkpoints or none."""

import json
import os
import re
import shutil
import signal
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration
from transformers.trainer_callback import TrainerState

from amvl_fast import AMVLModel
from amvl_fast.cli import main
from amvl_fast.errors import AMVLError
from amvl_fast.training import load_run, read_config, train
from amvl_fast.training.checkpoints import ASIDE, newest
from amvl_fast.training.progress import StopOnSignal
from amvl_fast.training.trainer import AMVLTrainer


def weights(run_dir):
    return load_file(run_dir / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def run_in(settings, write, directory, **training):
    settings["training"] |= {"output_dir": str(directory), **training}
    config = read_config(write(settings))
    assert train(config) is None
    return config.output_dir


def test_the_same_seed_gives_the_same_run_and_another_seed_another(settings, write, tmp_path):
    a, b, c = (run_in(settings, write, tmp_path / str(i), seed=seed) for i, seed in enumerate((0, 0, 1)))
    assert same(weights(a), weights(b))
    assert not same(weights(a), weights(c))


def test_evaluations_do_not_change_a_run(settings, write, tmp_path):
    without = run_in(settings, write, tmp_path / "a")
    with_them = run_in(settings, write, tmp_path / "b", eval_strategy="steps", eval_steps=2)
    assert same(weights(without), weights(with_them))
    history = TrainerState.load_from_json(str(with_them / "trainer_state.json")).log_history
    evaluations = [entry for entry in history if "eval_accuracy" in entry]
    assert [entry["step"] for entry in evaluations] == [2, 4, 6]
    assert {"eval_nll_posterior", "eval_nll_prior", "eval_forward_kl", "eval_leakage"} <= evaluations[0].keys()


def test_logs_hold_every_term_and_tensorboard_has_them(settings, write, tmp_path):
    run = run_in(settings, write, tmp_path / "a")
    history = TrainerState.load_from_json(str(run / "trainer_state.json")).log_history
    steps = [entry for entry in history if "loss" in entry]
    assert [entry["step"] for entry in steps] == [2, 4, 6]
    assert {"ntp_loss", "forward_kl", "reverse_kl", "beta", "gamma", "grad_norm", "learning_rate"} <= steps[0].keys()
    events = EventAccumulator(str(next(run.glob("runs/*"))))
    events.Reload()
    assert [event.step for event in events.Scalars("train/forward_kl")] == [2, 4, 6]


def test_an_interrupted_run_goes_on_where_it_stopped(settings, write, tmp_path, monkeypatch, capsys):
    whole = run_in(settings, write, tmp_path / "whole")
    settings["training"]["output_dir"] = str(tmp_path / "halves")
    path = write(settings)

    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(StopOnSignal, "on_step_begin", interrupt)
        assert main(["train", str(path)]) == 130
    assert "Stopped after step 3; the same command goes on from there." in capsys.readouterr().out
    assert newest(tmp_path / "halves").name == "checkpoint-3"
    assert not (tmp_path / "halves" / "model.safetensors").exists()
    assert main(["train", str(path)]) == 0
    assert "going on from checkpoint-3" in capsys.readouterr().out
    assert same(weights(whole), weights(tmp_path / "halves"))
    assert main(["train", str(path)]) == 0
    assert "complete already" in capsys.readouterr().out


def test_a_run_is_not_continued_under_another_configuration(settings, write, tmp_path):
    run_in(settings, write, tmp_path / "a")
    settings["objective"]["beta"] = 0.5
    with pytest.raises(AMVLError, match=r"objective.beta was 1.0 and is 0.5.*choose another training.output_dir"):
        train(read_config(write(settings)))


def test_a_run_loads_as_what_it_is(settings, write, tmp_path):
    run = run_in(settings, write, tmp_path / "a")
    model, processor, source = load_run(run)
    assert isinstance(model, AMVLModel) and source == run
    assert type(AutoProcessor.from_pretrained(run)) is type(processor)
    settings["objective"] = {"name": "no_latents"}
    plain, _, _ = load_run(run_in(settings, write, tmp_path / "b"))
    assert isinstance(plain, Qwen2_5_VLForConditionalGeneration)
    with pytest.raises(AMVLError, match="holds no trained model"):
        load_run(tmp_path)


def test_a_frozen_vision_tower_does_not_move(settings, write, tmp_path, inputs):
    before = weights(inputs / "base")
    moved = {}
    for name in ("amvl", "no_latents"):
        settings["objective"] = {"name": name}
        after = weights(run_in(settings, write, tmp_path / name))
        pairs = [(key, after[key if name == "no_latents" else f"backbone.{key}"]) for key in before]
        moved[name] = {key for key, tensor in pairs if not torch.equal(before[key], tensor)}
        assert not [key for key in moved[name] if "visual" in key]
        assert any("layers" in key for key in moved[name])


def fail_half_way(self, output_dir=None, **kwargs):
    os.makedirs(output_dir, exist_ok=True)
    with open(os.path.join(output_dir, "model.safetensors"), "wb") as file:
        file.write(b"half")
    raise OSError(28, "No space left on device")


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before_it(settings, write, tmp_path, monkeypatch):
    settings["training"]["output_dir"] = str(tmp_path / "run")
    save = AMVLTrainer.save_model

    def full_at_six(self, output_dir=None, **kwargs):
        (save if self.state.global_step < 6 else fail_half_way)(self, output_dir, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(AMVLTrainer, "save_model", full_at_six)
        with pytest.raises(AMVLError, match="No space left.*checkpoint-3, is whole: free space"):
            train(read_config(write(settings)))
    assert newest(tmp_path / "run").name == "checkpoint-3"
    assert not (tmp_path / "run" / ASIDE).exists()
    assert weights(tmp_path / "run" / "checkpoint-3")
    assert train(read_config(write(settings))) is None  # with space again, the same command ends the run


def test_too_little_space_is_told_before_the_first_step(settings, write, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 1000))
    with pytest.raises(AMVLError, match="MiB free, but one checkpoint takes"):
        train(read_config(write(settings)))


def test_old_checkpoints_are_removed_and_new_ones_are_whole(settings, write, tmp_path):
    run = run_in(settings, write, tmp_path / "a", save_steps=1, save_total_limit=2)
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-5", "checkpoint-6"]
    files = {path.name for path in (run / "checkpoint-6").iterdir()}
    assert {
        "model.safetensors",
        "config.json",
        "optimizer.pt",
        "trainer_state.json",
        "rng_state.pth",
    } <= files


def test_a_loss_that_is_not_finite_ends_the_run(settings, write, monkeypatch):
    settings["training"] |= {"learning_rate": 1e30, "max_grad_norm": 0.0, "save_steps": 100}
    with pytest.raises(AMVLError, match="The loss is (nan|inf) at step"):
        train(read_config(write(settings)))


def test_weights_that_are_not_finite_are_not_saved(settings, write, tmp_path):
    settings["training"] |= {"learning_rate": 1e30, "max_grad_norm": 0.0, "save_steps": 1, "logging_steps": 6}
    with pytest.raises(AMVLError, match="no longer finite at step"):
        train(read_config(write(settings)))
    saved = newest(tmp_path / "run")
    assert saved is None or all(torch.isfinite(tensor).all() for tensor in weights(saved).values())


@pytest.mark.parametrize(
    ("section", "key", "value", "words"),
    [
        ("model", "backbone", "/nowhere/at/all", "neither a directory with a model nor a hub name"),
        ("data", "train", "/nowhere.jsonl", "nowhere.jsonl"),
        ("latents", "num_latents", 0, "num_latents is 0"),
        ("training", "lr_scheduler_type", "zigzag", "The section training: is not usable"),
        ("training", "eval_strategy", "steps", "data.test names no file"),
        ("training", "load_best_model_at_end", True, "load_best_model_at_end is not supported"),
        ("training", "output_dir", "/proc/nowhere", "/proc/nowhere cannot be written to"),
        ("model", "dtype", "bf16", "cannot be loaded with"),
        ("model", "attn_implementation", "nope", "cannot be loaded with"),
    ],
)
def test_mistakes_are_told_in_one_line_before_any_step(settings, write, capsys, section, key, value, words):
    settings[section][key] = value
    if key == "eval_strategy":
        settings["data"].pop("test")
    assert main(["train", str(write(settings))]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("amvl-fast: ") and re.search(words, error), error


def test_an_unsupported_architecture_is_told(settings, write, tmp_path, capsys):
    from transformers import LlamaConfig

    LlamaConfig(hidden_size=8, num_attention_heads=1).save_pretrained(tmp_path / "llama")
    settings["model"]["backbone"] = str(tmp_path / "llama")
    assert main(["train", str(write(settings))]) == 2
    assert "the architecture 'llama'" in capsys.readouterr().err


def test_a_row_with_a_missing_image_is_told(settings, write, tmp_path, inputs, capsys):
    row = json.loads((inputs / "train.jsonl").read_text().splitlines()[0]) | {"images": ["gone.png"]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    settings["data"]["train"] = str(tmp_path / "rows.jsonl")
    assert main(["train", str(write(settings))]) == 2
    assert "gone.png" in capsys.readouterr().err

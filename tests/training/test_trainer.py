"""`AMVLTrainer` in a script of one's own, its arguments, and the parts that it trains apart."""

import shutil

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, HfArgumentParser, TrainingArguments

from amvl_fast import AMVLConfig, AMVLModel
from amvl_fast.data import ChatCollator, ChatDataset, ChatStream
from amvl_fast.errors import AMVLError
from amvl_fast.lora import LoraSection, add_lora
from amvl_fast.objective import Objective
from amvl_fast.training import AMVLTrainer, AMVLTrainingArguments, load_run, read_config, train
from amvl_fast.training.checkpoints import newest
from amvl_fast.training.loading import load_model, load_processor
from amvl_fast.training.parts import freeze, gradient_norms, parts_of

from .trajectories import history, logs, same, weights


@pytest.fixture
def model(inputs):
    torch.manual_seed(0)
    return AMVLModel.from_backbone(str(inputs / "base"), AMVLConfig(num_latents=2, latent_dim=4))


@pytest.fixture
def trainer_of(inputs, tmp_path):
    processor = AutoProcessor.from_pretrained(inputs / "base")

    def trainer_of(model, **arguments):
        options = {"max_steps": 4, "logging_steps": 1, "report_to": "none", "use_cpu": True, "save_strategy": "no"}
        return AMVLTrainer(
            model=model,
            args=AMVLTrainingArguments(str(tmp_path / "own"), **(options | arguments)),
            data_collator=ChatCollator(processor),
            train_dataset=ChatDataset(inputs / "train.jsonl"),
            eval_dataset=ChatDataset(inputs / "test.jsonl"),
        )

    return trainer_of


def test_six_lines_of_ones_own_train(trainer_of, model):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = trainer_of(model, objective={"beta": 0.5, "gamma": 0.1}, eval_strategy="steps", eval_steps=2)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2, 3, 4] and steps[-1]["beta"] == 0.5
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("eval_leakage" in entry for entry in trainer.state.log_history)


def test_what_a_step_logs(trainer_of, model):
    trainer = trainer_of(model, per_device_train_batch_size=6)
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    per_slot = [entry[f"{name}_slot_{i}"] for name in ("forward_kl", "reverse_kl") for i in range(2)]
    assert all(kl > 0 for kl in per_slot)
    # The mean over slots and dimensions is what the loss has.
    assert entry["forward_kl"] == pytest.approx(sum(per_slot[:2]) / 8, rel=1e-5)
    norms = [entry[f"grad_norm_{part}"] for part in ("language_model", "latents")]
    assert sum(norm**2 for norm in norms) ** 0.5 == pytest.approx(entry["grad_norm"], rel=1e-4)
    assert entry["tokens_per_second"] > 6 * entry["samples_per_second"] > 0
    assert 0.05 < entry["peak_memory_gib"] < 100 and entry["model_tflops_per_second"] > 0


def test_arguments_come_as_text_too():
    parser = HfArgumentParser(AMVLTrainingArguments)
    words = [
        "--output_dir",
        "runs/x",
        "--objective",
        '{"name": "elbo", "beta": 0.3}',
        "--latents_learning_rate",
        "1e-3",
    ]
    arguments = parser.parse_args_into_dataclasses(words)[0]
    assert arguments.objective == Objective("elbo", beta=0.3) and arguments.latents_learning_rate == 1e-3
    assert '"beta": 0.3' in arguments.to_json_string()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"objective": {"bet": 1}}, "training.objective is .*unexpected keyword argument 'bet'"),
        ({"objective": "amvl"}, "training.objective is 'amvl'"),
        ({"objective": {"beta": -1}}, "objective.beta is -1"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end is not supported"),
        ({"save_strategy": "best"}, "save_strategy 'best' is not supported"),
        ({"save_only_model": True}, "save_only_model is not supported; a run could not go on"),
        ({"push_to_hub": True}, "push_to_hub is not supported"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size is not supported"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is not supported"),
        ({"average_tokens_across_devices": False}, "always averaged over all devices"),
    ],
)
def test_arguments_that_make_no_sense_are_told(options, words):
    with pytest.raises(AMVLError, match=words):
        AMVLTrainingArguments("runs/x", report_to="none", **options)


def test_models_and_objectives_must_go_together(trainer_of, model, inputs):
    with pytest.raises(AMVLError, match="objective 'no_latents' does not go with a AMVLModel"):
        trainer_of(model, objective={"name": "no_latents"})
    plain = AutoModelForImageTextToText.from_pretrained(inputs / "base")
    with pytest.raises(AMVLError, match="objective 'amvl' does not go with a Qwen2_5_VL"):
        trainer_of(plain)
    with pytest.raises(AMVLError, match="pass AMVLTrainingArguments"):
        AMVLTrainer(model=model, args=TrainingArguments("runs/x", report_to="none"))


def test_parts_are_all_of_a_model_and_each_its_own(model):
    adapted = add_lora(model, LoraSection(r=2))
    parts = parts_of(adapted)
    assert list(parts) == ["language_model", "lora", "latents", "vision_tower"]
    names = [name for part in parts.values() for name in part]
    assert sorted(names) == sorted(name for name, _ in adapted.named_parameters())
    assert all("visual" in name for name in parts["vision_tower"])
    assert all("lora_" in name and "language_model" in name for name in parts["lora"])
    trained = {part for part, found in parts.items() if any(p.requires_grad for p in found.values())}
    assert trained == {"lora", "latents"}


def test_each_part_has_its_learning_rate(trainer_of, model):
    """Plain descent: a part that is frozen by its rate stays, and another goes twice as far at twice the rate."""
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    moved = {}
    for factor in (1, 2):
        model.load_state_dict(
            start | {"backbone.lm_head.weight": start["backbone.model.language_model.embed_tokens.weight"]}
        )
        options = {"optim": "sgd", "learning_rate": 0.0, "latents_learning_rate": 0.02 * factor, "max_grad_norm": 0.0}
        trainer_of(model, max_steps=1, lr_scheduler_type="constant", warmup_steps=0, **options).train()
        after = dict(model.named_parameters())
        moved[factor] = {name: after[name].detach() - start[name] for name in start}
    for name in moved[1]:
        if name.startswith("latents."):
            assert moved[1][name].abs().max() > 1e-4
            torch.testing.assert_close(moved[2][name], 2 * moved[1][name], rtol=1e-3, atol=1e-5)
        else:
            assert moved[1][name].abs().max() == moved[2][name].abs().max() == 0


def test_gradient_norms_are_those_of_the_parts(model, inputs):
    rows = ChatDataset(inputs / "train.jsonl")
    batch = ChatCollator(AutoProcessor.from_pretrained(inputs / "base"))([rows[i] for i in range(3)])
    model(**batch).loss.backward()
    expected = torch.cat([p.grad.flatten() for p in model.latents.parameters()]).norm().item()
    assert gradient_norms(model)["latents"] == pytest.approx(expected, rel=1e-5)
    assert "vision_tower" not in gradient_norms(model)


def test_parts_are_frozen_by_name(settings, write, tmp_path, inputs):
    settings["model"]["freeze"] = ["vision_tower", "language_model"]
    assert train(read_config(write(settings))) is None
    after, before = weights(tmp_path / "run"), weights(inputs / "base")
    assert all(torch.equal(before[name], after[f"backbone.{name}"]) for name in before)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (["tower"], "model.freeze names 'tower'.*use of: language_model, latents, vision_tower"),
        (["vision_tower", "language_model", "latents"], "leaves nothing to train"),
        ("vision_tower", r"write a list of parts, such as \[vision_tower\]"),
    ],
)
def test_what_cannot_be_frozen_is_told(settings, write, parts, words):
    settings["model"]["freeze"] = parts
    with pytest.raises(AMVLError, match=words):
        train(read_config(write(settings)))


def test_freezing_leaves_what_is_trained_alone(model):
    freeze(model, ["vision_tower", "connector"])  # which Qwen counts to the tower
    assert all(p.requires_grad for p in parts_of(model)["language_model"].values())


# LoRA


def test_lora_trains_adapters_and_latents_alone_and_resumes(settings, write, tmp_path, inputs):
    settings["lora"] = {"r": 2, "lora_alpha": 8}
    assert train(read_config(write(settings))) is None
    run = tmp_path / "run"
    assert not (run / "model.safetensors").exists() and (run / "adapter_model.safetensors").exists()
    assert all("lora_" in name or "latents" in name for name in weights(run))
    expected = weights(run)
    for name in ("trainer_state.json", "adapter_model.safetensors", "config.json", "checkpoint-6/scheduler.pt"):
        (run / name).unlink()
    assert newest(run, say=lambda _: None).name == "checkpoint-3"
    assert train(read_config(write(settings))) is None
    assert same(weights(run), expected)


def test_a_lora_run_loads_with_its_adapters_merged(settings, write, tmp_path, inputs):
    settings["lora"] = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
    settings["training"]["learning_rate"] = 0.1
    assert train(read_config(write(settings))) is None
    for source in (tmp_path / "run", None):
        if source is None:  # while it is trained
            for name in ("config.json", "trainer_state.json"):
                (tmp_path / "run" / name).unlink()
        model, _, _ = load_run(tmp_path / "run")
        assert type(model) is AMVLModel
        saved, base, state = weights(tmp_path / "run"), weights(inputs / "base"), model.state_dict()
        for layer in ("model.language_model.layers.0.self_attn.q_proj", "model.language_model.layers.1.mlp.up_proj"):
            a, b = (saved.get(f"base_model.model.backbone.{layer}.lora_{x}.weight") for x in "AB")
            added = 0 if a is None else 32 / 2 * b @ a
            assert ("q_proj" in layer) == (a is not None)
            key = layer.replace("model.language_model", "model") if f"{layer}.weight" not in base else layer
            torch.testing.assert_close(state[f"backbone.{layer}.weight"], base[f"{key}.weight"] + added)
        torch.testing.assert_close(state["latents.slots"], saved["base_model.model.latents.slots"])


def test_lora_on_bfloat16_trains_float32(settings, write, tmp_path):
    settings["model"]["dtype"], settings["lora"] = "bfloat16", {"r": 2}
    settings["training"]["max_steps"] = 2
    assert train(read_config(write(settings))) is None
    assert {tensor.dtype for tensor in weights(tmp_path / "run").values()} == {torch.float32}
    model, _, _ = load_run(tmp_path / "run")
    assert model.backbone.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"r": 0}, "lora.r is 0"),
        ({"target_modules": ["q_prj"]}, r"lora.target_modules holds \['q_prj'\]; use of: down_proj, gate_proj"),
        ({"rank": 4}, "Unknown key lora.rank"),
    ],
)
def test_lora_options_are_checked(settings, write, lora, words):
    settings["lora"] = lora
    with pytest.raises(AMVLError, match=words):
        train(read_config(write(settings)))


# Data


def test_bad_rows_are_left_out_where_that_is_asked_for(settings, write, tmp_path, inputs):
    lines = (inputs / "train.jsonl").read_text().splitlines()
    lines[5] = lines[5].replace('"5.png"', '"gone.png"')
    for image in inputs.glob("*.png"):
        (tmp_path / image.name).write_bytes(image.read_bytes())
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    settings["data"] |= {"train": str(tmp_path / "rows.jsonl"), "on_bad_sample": "skip", "max_bad_share": 0.05}
    settings["training"]["dataloader_num_workers"] = 1
    assert train(read_config(write(settings))) is None
    named = (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()
    assert len(named) == 1 and '"row": 5' in named[0] and "gone.png" in named[0]


def test_too_many_bad_rows_stop_a_run_with_one_sentence(settings, write, tmp_path, inputs, capsys):
    from amvl_fast.cli import main

    (tmp_path / "rows.jsonl").write_text((inputs / "train.jsonl").read_text())  # its images are elsewhere
    settings["data"] |= {"train": str(tmp_path / "rows.jsonl"), "on_bad_sample": "skip"}
    settings["training"]["dataloader_num_workers"] = 1
    assert main(["train", str(write(settings))]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("amvl-fast: ") and "samples are bad" in error and "skipped.jsonl" in error


def test_a_streamed_run_resumes(settings, write, tmp_path):
    settings["data"] |= {"streaming": True, "shuffle_buffer": 5}
    assert train(read_config(write(settings))) is None
    run = tmp_path / "run"
    expected, steps = weights(run), logs(run)
    for name in ("trainer_state.json", "model.safetensors", "checkpoint-6/model.safetensors"):
        (run / name).unlink()
    assert train(read_config(write(settings))) is None
    assert same(weights(run), expected)
    assert logs(run)[-1] == steps[-1]


def test_epochs_do_instead_of_steps(settings, write, tmp_path):
    del settings["training"]["max_steps"]
    settings["training"]["num_train_epochs"] = 0.5
    assert train(read_config(write(settings))) is None
    assert history(tmp_path / "run")[-1]["step"] == 3
    assert train(read_config(write(settings))) is None  # complete already
    settings["data"]["streaming"] = True
    with pytest.raises(AMVLError, match="training.max_steps, which data.streaming takes"):
        read_config(write(settings))


def test_another_batch_size_is_refused_on_the_way(settings, write, tmp_path):
    assert train(read_config(write(settings))) is None
    (tmp_path / "run" / "trainer_state.json").unlink()
    settings["training"] |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    assert train(read_config(write(settings))) is None  # as many samples a step
    (tmp_path / "run" / "trainer_state.json").unlink()
    settings["training"]["gradient_accumulation_steps"] = 3
    with pytest.raises(AMVLError, match="steps of 4 samples, and this run would take 6"):
        train(read_config(write(settings)))


# What only a script of one's own can ask for


def test_a_script_resumes_and_its_checkpoints_are_complete(trainer_of, model, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2}
    trainer_of(model, **saving).train()
    again = AMVLModel.from_pretrained(tmp_path / "own" / "checkpoint-2")
    freeze(again, ["vision_tower"])
    (tmp_path / "own" / "checkpoint-4" / "scheduler.pt").unlink()
    trainer = trainer_of(again, **saving)
    trainer.train(resume_from_checkpoint=True)
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2, 3, 4]
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    AutoProcessor.from_pretrained(tmp_path / "own" / "checkpoint-4")


def test_weights_of_the_loss_are_logged_as_they_were_used(trainer_of, model, monkeypatch):
    used, forward = [], AMVLModel.forward
    monkeypatch.setattr(AMVLModel, "forward", lambda *a, **k: used.append((k["beta"], k["gamma"])) or forward(*a, **k))
    trainer = trainer_of(model, max_steps=6, objective={"kl_warmup_steps": 3, "kl_delay_steps": 2})
    trainer.train()
    logged = [(entry["beta"], entry["gamma"]) for entry in trainer.state.log_history if "loss" in entry]
    assert logged == used and len(set(used)) > 3


def test_rows_may_have_no_numbers_and_there_may_be_several_sets(trainer_of, model, inputs):
    dataset = ChatDataset(inputs / "test.jsonl")
    rows = [{name: value for name, value in dataset[i].items() if name != "row"} for i in range(4)]
    trainer = trainer_of(model, max_steps=1)
    trainer.train_dataset = rows
    trainer.train()
    metrics = trainer.evaluate({"two": rows[:2], "four": rows})
    assert metrics["eval_two_rows"] == 2 and metrics["eval_four_rows"] == 4
    trainer.eval_dataset = None
    with pytest.raises(AMVLError, match="no rows to evaluate on"):
        trainer.evaluate()


OTHER_SHARE = {"rank": 1, "world_size": 2, "batch_size": 8}


@pytest.mark.parametrize(
    ("options", "words"), [({"batch_size": 3}, "batch_size=3; make it 8"), (OTHER_SHARE, "rank=1; make it 0")]
)
def test_a_stream_must_be_dealt_as_it_is_trained_on(trainer_of, model, inputs, options, words):
    trainer = trainer_of(model)
    trainer.train_dataset = ChatStream(inputs / "train.jsonl", **options)
    with pytest.raises(AMVLError, match=words):
        trainer.train()


def test_a_stream_may_end(trainer_of, model, inputs):
    """Three batches of eight, twice: the losses of six steps, none diluted by what came after the end."""
    trainer = trainer_of(model, max_steps=6, learning_rate=0.0, objective={"name": "ntp"})
    trainer.train_dataset = ChatStream(inputs / "train.jsonl", batch_size=8)
    trainer.train()
    losses = [entry["ntp_loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 6 and min(losses) > 0.9 * max(losses)


def test_logs_and_checkpoints_come_as_often_as_is_asked_on_the_way(settings, write, tmp_path):
    assert train(read_config(write(settings))) is None
    run = tmp_path / "run"
    for name in ("trainer_state.json", "checkpoint-6/scheduler.pt"):
        (run / name).unlink()
    settings["training"] |= {"save_steps": 1, "logging_steps": 1}
    assert train(read_config(write(settings))) is None
    assert [entry["step"] for entry in logs(run)] == [2, 4, 5, 6]
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-5", "checkpoint-6"]


def test_a_rate_that_changes_goes_on_without_moments_too(settings, write, tmp_path):
    settings["training"] |= {"optim": "sgd", "lr_scheduler_type": "linear", "learning_rate": 0.01}
    assert train(read_config(write(settings))) is None
    run = tmp_path / "run"
    expected = weights(run)
    for name in ("trainer_state.json", "checkpoint-6/scheduler.pt"):
        (run / name).unlink()
    assert train(read_config(write(settings))) is None
    assert same(weights(run), expected)


def test_weights_that_are_not_finite_end_no_run(settings, write, tmp_path):
    settings["training"] |= {"learning_rate": 1e30, "max_grad_norm": 0.0, "save_strategy": "no", "logging_steps": 100}
    with pytest.raises(AMVLError, match="The weights are no longer finite"):
        train(read_config(write(settings)))
    assert not (tmp_path / "run" / "trainer_state.json").exists()


def test_latents_may_be_frozen_beside_adapters(settings, write):
    settings["lora"], settings["model"]["freeze"] = {"r": 2}, ["latents"]
    config = read_config(write(settings))
    processor = load_processor(config)
    model = load_model(config, processor, next(iter(ChatDataset(config.data.train))))
    assert {name for name, part in parts_of(model).items() if any(p.requires_grad for p in part.values())} == {"lora"}


def test_seeds_may_be_dates(settings, write):
    settings["training"] |= {"seed": 20261123, "max_steps": 1}
    assert train(read_config(write(settings))) is None


def test_parameters_without_gradients_do_not_keep_a_run_from_resuming(trainer_of, model, tmp_path):
    """As the last layer of a tower of which an earlier one is read."""
    saving = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}

    def with_one_more(model):
        model.unread = torch.nn.Parameter(torch.ones(3))
        return model

    trainer_of(with_one_more(model), **saving).train()
    torch.manual_seed(0)
    again = with_one_more(AMVLModel.from_pretrained(tmp_path / "own" / "checkpoint-2"))
    freeze(again, ["vision_tower"])
    shutil.rmtree(tmp_path / "own" / "checkpoint-4")
    trainer = trainer_of(again, **saving)
    trainer._load_weights = lambda checkpoint: None  # they are those
    trainer.train(resume_from_checkpoint=True)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    assert again.unread not in trainer.optimizer.state


def test_whole_checkpoints_of_later_steps_are_not_trained_past(trainer_of, model, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2}
    trainer_of(model, **saving).train()
    for beginning in (None, str(tmp_path / "own" / "checkpoint-2")):
        with pytest.raises(AMVLError, match="checkpoint-4 is of a later step than the one that this run begins at"):
            trainer_of(model, **saving).train(resume_from_checkpoint=beginning)


def test_there_must_be_a_checkpoint_to_go_on_from(trainer_of, model):
    with pytest.raises(AMVLError, match="has no whole checkpoint to go on from"):
        trainer_of(model).train(resume_from_checkpoint=True)

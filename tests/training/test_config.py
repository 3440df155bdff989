"""The YAML file: what it gives, what overrides do, and how mistakes are told."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils.deepspeed import HfDeepSpeedConfig

from amvl_fast import AMVLConfig
from amvl_fast.errors import AMVLError
from amvl_fast.training import read_config
from amvl_fast.training.config import LATENT_KEYS


def test_sections_and_overrides(settings, write):
    config = read_config(write(settings), ["objective.beta=0.5", "learning_rate=2e-4", "training.bf16=false"])
    assert config.objective.beta == 0.5 and config.objective.name == "amvl"
    assert config.training["learning_rate"] == 2e-4 and config.training["bf16"] is False
    assert config.latents == {"num_latents": 2, "latent_dim": 4}
    assert config.model.freeze == ("vision_tower",) and config.lora is None


def test_numbers_without_a_point_are_numbers(settings, write):
    path = write(settings)
    path.write_text(path.read_text().replace("learning_rate: 0.001", "learning_rate: 1e-3"))
    assert "1e-3" in path.read_text()
    assert read_config(path).training["learning_rate"] == 1e-3


def test_latent_keys_are_those_of_the_configuration():
    assert {"num_latents", "latent_dim", "kl_reduction", "logvar_init"} <= set(LATENT_KEYS)
    assert "backbone_config" not in LATENT_KEYS and "model_type" not in LATENT_KEYS


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["objective.bета=1"], "Unknown key"),
        (["objective.betta=1"], "did you mean 'beta'"),
        (["learning_rat=1"], "did you mean 'training.learning_rate'"),
        (["modell.backbone=x"], "did you mean 'model'"),
        (["backbone"], "not of the form section.key=value"),
        (["objective.name=mvl"], "objective.name is 'mvl'; use one of: no_latents, ntp"),
        (["objective.beta=-1"], "objective.beta is -1"),
        (["objective.beta=high"], "objective.beta is 'high', but must be of type float"),
        (["data.eval_rows=0.5"], "data.eval_rows is 0.5, but must be of type int"),
        (["objective.beta=["], r"override 'objective.beta=\[' is not valid YAML"),
        (["objective.beta=2024-13-45"], "is not valid YAML"),
        (["objective.beta=.inf"], "objective.beta is inf; it must be a finite number"),
        (["objective.gamma=.nan"], "objective.gamma is nan; it must be a finite number"),
        (["latents.num_latents=two"], "latents.num_latents is 'two', but must be of type int"),
        (["latents.num_latents=2.5"], "latents.num_latents is 2.5, but must be of type int"),
        (["latents.num_latents=true"], "latents.num_latents is True, but must be of type int"),
        (["latents.logvar_init=null"], "latents.logvar_init is None, but must be of type float"),
        (["latents.logvar_min=-.inf"], "latents.logvar_min is -inf; it must be a finite number"),
        (["latents.end_of_latents=1"], "latents.end_of_latents is 1, but must be of type bool"),
        (["latents.kl_reduction=3"], "latents.kl_reduction is 3, but must be of type str"),
        (["training.max_steps=abc"], "training.max_steps is 'abc', but must be of type int"),
        (["training.max_steps=1.5"], "training.max_steps is 1.5, but must be of type int"),
        (["training.max_steps=0"], "training.max_steps is 0; it must be at least 1"),
        (["training.seed=x"], "training.seed is 'x', but must be of type int"),
        (["training.data_seed=x"], "training.data_seed is 'x', but must be of type int or null"),
        (["training.bf16=1"], "training.bf16 is 1, but must be of type bool"),
        (["training.lr_scheduler_type=3"], "training.lr_scheduler_type is 3, but must be of type str"),
        (["training.save_strategy=true"], "training.save_strategy is True, but must be of type str"),
        (["training.learning_rate=abc"], "training.learning_rate is 'abc', but must be of type float"),
        (["training.learning_rate=-1e-3"], "training.learning_rate is -0.001; it must be at least 0"),
        (["training.learning_rate=.inf"], "training.learning_rate is inf; it must be a finite number"),
        (["training.output_dir=null"], "lacks training.output_dir"),
        (["per_device_train_batch_size=0"], "training.per_device_train_batch_size is 0; it must be at least 1"),
        (["per_device_eval_batch_size=0"], "training.per_device_eval_batch_size is 0; it must be at least 1"),
        (["data.eval_rows=0"], "data.eval_rows is 0; it must be at least 1"),
        (["data.max_new_tokens=0"], "data.max_new_tokens is 0; it must be at least 1"),
    ],
)
def test_bad_overrides_are_told(settings, write, overrides, words):
    with pytest.raises(AMVLError, match=words):
        read_config(write(settings), overrides)


def test_bad_files_are_told(settings, write, tmp_path):
    with pytest.raises(AMVLError, match="no configuration file"):
        read_config(tmp_path / "missing.yaml")
    path = write(settings)
    for text, words in (
        ("model: [", "not valid YAML"),
        ("- a", "must hold the sections"),
        ("model: 3", "must hold keys and values"),
        ("traning: {}", "did you mean 'training'"),
        ("training: {max_step: 3}", "did you mean 'max_steps'"),
        ("model: {backbone: x}", "lacks data.train"),
    ):
        path.write_text(text)
        with pytest.raises(AMVLError, match=words):
            read_config(path)


def test_a_binary_file_is_told(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(AMVLError, match="not valid YAML"):
        read_config(path)


def test_values_become_what_their_key_takes(settings, write):
    overrides = ["max_steps=1e1", "num_latents=4.0", "data_seed=3", "learning_rate=1", "save_strategy=no"]
    overrides += ["run_name=1e3", "max_grad_norm=.inf", "eval_strategy=no", "logging_strategy=no", "eval_steps=null"]
    config = read_config(write(settings), [*overrides, "lr_scheduler_kwargs={min_lr: 0.1}"])
    training = config.training
    assert (training["max_steps"], config.latents["num_latents"], training["data_seed"]) == (10, 4, 3)
    assert type(training["max_steps"]) is type(config.latents["num_latents"]) is int
    assert training["save_strategy"] == training["eval_strategy"] == training["logging_strategy"] == "no"
    assert (training["run_name"], training["learning_rate"], training["eval_steps"]) == ("1e3", 1, None)
    assert training["max_grad_norm"] == float("inf") and training["lr_scheduler_kwargs"] == {"min_lr": 0.1}


ROOT = Path(__file__).parents[2]
ENGINES = sorted((ROOT / "configs" / "engines").glob("*.yaml"))
CONFIGS = sorted(set((ROOT / "configs").rglob("*.yaml")) - set(ENGINES))


ENGINE_NAMES = ["ddp", "fsdp2", "zero2", "zero3"]


def test_there_are_shipped_configurations():
    assert len(CONFIGS) >= 6 and [path.stem for path in ENGINES] == ENGINE_NAMES


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configurations_are_read(path):
    config = read_config(path)
    assert config.output_dir.parts[0] == "runs"
    if config.objective.terms.latents:
        assert AMVLConfig(**config.latents).num_latents == config.latents["num_latents"]


@pytest.mark.parametrize("path", ENGINES, ids=lambda path: path.stem)
def test_shipped_engines_are_read_by_accelerate(path, monkeypatch):
    monkeypatch.chdir(ROOT)  # from where they name other files
    config = load_config_from_file(str(path))
    assert config.num_processes == 8 and f"--config_file configs/engines/{path.name}" in path.read_text()
    if path.stem.startswith("zero"):
        zero = HfDeepSpeedConfig(config.deepspeed_config["deepspeed_config_file"])
        assert zero.get_value("zero_optimization.stage") == int(path.stem[-1])
        # A checkpoint without whole weights could be loaded by nobody.
        assert zero.is_zero2() or zero.get_value("zero_optimization.stage3_gather_16bit_weights_on_model_save")

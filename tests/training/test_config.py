"""The YAML file: what it gives, what overrides do, and how mistakes are told."""

from pathlib import Path

import pytest

from amvl_fast import AMVLConfig
from amvl_fast.errors import AMVLError
from amvl_fast.training import read_config
from amvl_fast.training.config import LATENT_KEYS


def test_sections_and_overrides(settings, write):
    config = read_config(write(settings), ["objective.beta=0.5", "learning_rate=2e-4", "training.bf16=false"])
    assert config.objective.beta == 0.5 and config.objective.name == "amvl"
    assert config.training["learning_rate"] == 2e-4 and config.training["bf16"] is False
    assert config.latents == {"num_latents": 2, "latent_dim": 4}
    assert config.model.freeze_vision is True


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


@pytest.mark.parametrize("path", sorted(Path("configs").rglob("*.yaml")), ids=str)
def test_shipped_configurations_are_read(path):
    config = read_config(path)
    assert config.output_dir.parts[0] == "runs"
    if config.objective.terms.latents:
        assert AMVLConfig(**config.latents).num_latents == config.latents["num_latents"]

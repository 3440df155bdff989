"""Ways to train that must not change what is learnt: they differ in speed, memory and rounding only."""

import pytest
from model.flash import use_flash

from amvl_fast.training import read_config, train
from amvl_fast.training import run as runs

from .trajectories import PLAIN, assert_same_trajectory, logs


@pytest.fixture
def run(settings, write, tmp_path):
    def run(name, **training):
        settings["model"]["dtype"] = "float64"
        settings["training"] |= PLAIN | {"max_steps": 4, "per_device_train_batch_size": 8, **training}
        settings["training"]["output_dir"] = str(tmp_path / name)
        config = read_config(write(settings))
        assert train(config) is None
        return config.output_dir

    return run


@pytest.fixture
def whole(run):
    return run("whole")


def test_accumulated_parts_are_the_whole_batch(run, whole):
    assert_same_trajectory(run("halves", per_device_train_batch_size=4, gradient_accumulation_steps=2), whole)
    assert_same_trajectory(run("eighths", per_device_train_batch_size=1, gradient_accumulation_steps=8), whole)


@pytest.mark.parametrize("strategy", ["random", "sequential", "group_by_length", "batch_rebalance"])
def test_epochs_that_do_not_divide_are_split_alike(run, settings, strategy):
    """Three steps an epoch (two where what does not fill a step is left out), of 20 rows and 8 samples a step."""
    settings["data"]["max_rows"] = 20
    options = {"max_steps": 5, "train_sampling_strategy": strategy}
    whole = run("whole", **options)
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    assert_same_trajectory(run("parts", **options, **parts), whole)


def test_a_plain_model_accumulates_too(run, settings):
    settings["objective"] = {"name": "no_latents"}
    whole = run("whole")
    assert_same_trajectory(run("halves", per_device_train_batch_size=4, gradient_accumulation_steps=2), whole)


def test_weights_of_the_loss_belong_to_the_whole_batch(run, settings):
    """Terms that are averaged over tokens, over samples, or after a threshold, and several samples of the posterior."""
    settings["objective"] = {
        "name": "elbo",
        "prior_ntp_weight": 0.5,
        "free_bits": 0.01,
        "num_posterior_samples": 2,
        "posterior_bound": "importance",
    }
    settings["latents"]["kl_reduction"] = "sum"
    whole = run("whole", learning_rate=0.01)
    halves = run("halves", learning_rate=0.01, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    assert_same_trajectory(halves, whole)


def test_checkpointed_activations_change_nothing(run, whole):
    assert_same_trajectory(run("checkpointed", gradient_checkpointing=True), whole)


def test_the_plain_step_trains_the_same(run, whole):
    assert_same_trajectory(run("three", execution="three_pass"), whole)


def test_grouping_by_length_within_a_batch_changes_nothing(run, whole):
    """The same samples a step, sorted by length over parts of several sizes."""
    parts = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    assert_same_trajectory(run("parts", train_sampling_strategy="batch_rebalance", **parts), whole)


def test_packing_changes_nothing(run, monkeypatch):
    load, calls = runs.load_model, []

    def load_with_flash(*args):
        model = load(*args)
        calls.append(use_flash(monkeypatch, model).calls)
        return model

    monkeypatch.setattr(runs, "load_model", load_with_flash)
    assert_same_trajectory(run("packed", padding_free=True), run("padded"))
    packed, padded = calls
    assert packed["dense"] == 0 < packed["varlen"] and padded["varlen"] > 0


def test_noise_is_another_at_each_step_and_seed(run, settings):
    """The same rows in every step, and nothing learnt."""
    settings["objective"] = {"name": "ntp"}
    frozen = {"learning_rate": 0.0, "train_sampling_strategy": "sequential", "per_device_train_batch_size": 24}
    first, again, other = (
        [entry["ntp_loss"] for entry in logs(run(name, seed=seed, **frozen))]
        for name, seed in (("first", 0), ("again", 0), ("other", 1))
    )
    assert first == again and len(set(first)) == len(first)
    # Slots and heads are drawn with the seed as well, so a step of the other run is no step of this one.
    assert not set(first) & set(other)

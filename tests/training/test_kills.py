"""kill -9 at any moment, and damage to what is on the disk: the same command goes on, and nothing shows it happened."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from amvl_fast.errors import AMVLError
from amvl_fast.training import read_config, train
from amvl_fast.training.checkpoints import ASIDE, MANIFEST, newest, write_manifest
from amvl_fast.training.zero import weights_only

from .conftest import settings_for
from .trajectories import logs, same, weights

DRIVER = Path(__file__).with_name("killed.py")


def run_killed(settings, directory, seed, kills):
    settings["training"]["output_dir"] = str(directory)
    path = directory.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(settings))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(DRIVER), str(path), str(seed), str(kills)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def saving(settings):
    settings["training"] |= {"max_steps": 10, "save_steps": 2, "save_total_limit": 2, "report_to": "none"}
    # Not at the end of an epoch, and at a rate at which a step too many would show.
    settings["training"]["lr_scheduler_type"] = "constant"
    settings["latents"]["num_latents"] = 3
    return settings


def everything(run_dir):
    """All that a run leaves for one that goes on from it, but for what the clock says."""
    checkpoint = newest(run_dir)
    states = {name: torch.load(checkpoint / name, weights_only=True) for name in ("optimizer.pt", "scheduler.pt")}
    moments = {
        f"{name} {key}": value for name, s in states["optimizer.pt"]["state"].items() for key, value in s.items()
    }
    return weights(run_dir) | moments, states["scheduler.pt"], checkpoint.name


def test_ten_kills_leave_no_trace(saving, tmp_path):
    run_killed(saving, tmp_path / "whole", seed=0, kills=0)
    said = run_killed(saving, tmp_path / "killed", seed=int(os.environ.get("AMVL_FAST_KILL_SEED", "0")), kills=10)
    assert "lives 11" in said
    expected, ours = everything(tmp_path / "whole"), everything(tmp_path / "killed")
    assert same(ours[0], expected[0]) and ours[1:] == expected[1:]
    assert not (tmp_path / "killed" / ASIDE).exists()


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "truncated weights": lambda c: truncate(c / "model.safetensors"),
    "a bit of the optimiser": lambda c: flip_a_bit(c / "optimizer.pt"),
    "an empty schedule": lambda c: (c / "scheduler.pt").write_bytes(b""),
    "no random states": lambda c: (c / "rng_state.pth").unlink(),
    "no list": lambda c: (c / MANIFEST).unlink(),
    "half a list": lambda c: truncate(c / MANIFEST),
    "nothing": lambda c: [file.unlink() for file in c.iterdir()],
}


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """A run that ended, with checkpoints at its steps 2 and 4."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    settings = settings_for(inputs, directory)
    settings["training"] |= {"max_steps": 4, "save_steps": 2, "report_to": "none"}
    path = directory.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(settings))
    assert train(read_config(path)) is None
    return directory, path


@pytest.fixture
def unfinished(whole, tmp_path):
    """A copy of it as if it had not ended, and what goes on with it."""
    directory, path = whole
    shutil.copytree(directory, tmp_path / "run")
    for name in ("trainer_state.json", "model.safetensors"):
        (tmp_path / "run" / name).unlink()
    return tmp_path / "run", lambda: train(read_config(path, [f"training.output_dir={tmp_path / 'run'}"]))


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_with_a_message(whole, unfinished, name, capsys):
    run_dir, go_on = unfinished
    DAMAGES[name](run_dir / "checkpoint-4")
    assert go_on() is None
    said = capsys.readouterr().out
    assert f"{run_dir / 'checkpoint-4'} is passed over, because" in said and "going on from checkpoint-2" in said
    expected, ours = everything(whole[0]), everything(run_dir)
    assert same(ours[0], expected[0]) and ours[1:] == expected[1:]


def test_without_a_whole_checkpoint_a_run_starts_again(whole, unfinished, capsys):
    run_dir, go_on = unfinished
    for checkpoint in run_dir.glob("checkpoint-*"):
        truncate(checkpoint / "model.safetensors")
    assert go_on() is None
    assert "from the start" in capsys.readouterr().out
    assert same(everything(run_dir)[0], everything(whole[0])[0])


class Bomb:
    def __reduce__(self):
        return os.abort, ()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_no_pickle_of_a_run_is_loaded(unfinished, name):
    """Even one that is on the list: reading it as objects would end this process."""
    run_dir, go_on = unfinished
    checkpoint = run_dir / "checkpoint-2"
    shutil.rmtree(run_dir / "checkpoint-4")
    torch.save(Bomb(), checkpoint / name)
    (checkpoint / MANIFEST).unlink()
    write_manifest(checkpoint, {})
    if name == "training_args.bin":  # nobody reads it, nor is it written
        assert go_on() is None
        assert not list(run_dir.rglob("checkpoint-4/training_args.bin")) and not (run_dir / name).exists()
    else:
        with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
            go_on()


def test_weights_are_read_from_safetensors_alone(inputs, settings, write, tmp_path):
    """A directory that has weights as a pickle only is refused."""
    shutil.copytree(inputs / "base", tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    torch.save(Bomb(), tmp_path / "base" / "pytorch_model.bin")
    settings["model"]["backbone"] = str(tmp_path / "base")
    with pytest.raises(AMVLError, match="safetensors"):
        train(read_config(write(settings)))


def test_code_that_comes_with_a_model_does_not_run_unasked(inputs, settings, write, tmp_path):
    shutil.copytree(inputs / "base", tmp_path / "base")
    (tmp_path / "base" / "own.py").write_text("import os\nos.abort()\n")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    settings["model"]["backbone"] = str(tmp_path / "base")
    with pytest.raises(AMVLError, match="model.backbone: .*contains custom code"):
        train(read_config(write(settings)))


def test_deepspeed_s_files_are_read_the_same_way(tmp_path):
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    torch.save(Bomb(), tmp_path / "states.pt")
    with weights_only(), pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        TorchCheckpointEngine().load(str(tmp_path / "states.pt"))


def test_damaged_checkpoints_do_not_outlive_whole_ones(whole, unfinished):
    """Rotation keeps the newest: here the damaged one of a step to come, were it not removed."""
    run_dir, _ = unfinished
    shutil.copytree(run_dir / "checkpoint-4", run_dir / "checkpoint-8")
    truncate(run_dir / "checkpoint-8" / "model.safetensors")
    truncate(run_dir / "checkpoint-4" / "model.safetensors")
    overrides = [f"training.output_dir={run_dir}", "save_total_limit=1", "save_steps=1"]
    assert train(read_config(whole[1], overrides)) is None
    assert [path.name for path in run_dir.glob("checkpoint-*")] == ["checkpoint-4"]
    assert newest(run_dir) is not None


def test_a_run_killed_before_its_very_end_takes_no_step_more(whole, unfinished):
    run_dir, go_on = unfinished
    assert go_on() is None
    assert sorted(path.name for path in run_dir.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert same(everything(run_dir)[0], everything(whole[0])[0])
    assert logs(run_dir) == logs(whole[0])


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(settings, write, tmp_path, monkeypatch):
    """What a power cut would show, and kill -9 cannot: each file, and the directory, synced before the rename."""
    synced, fsync, replace, renamed = set(), os.fsync, os.replace, []

    def note(handle):
        synced.add(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    def check(source, target):
        if Path(source).name.startswith("checkpoint-"):
            files = {str(path) for path in [Path(source), *Path(source).rglob("*")]}
            renamed.append(Path(target).name)
            assert files <= synced, files - synced
            synced.clear()
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "replace", check)
    assert train(read_config(write(settings))) is None
    assert renamed == ["checkpoint-3", "checkpoint-6"] and str(tmp_path / "run") in synced

"""Two processes on the CPU: what they train is what one process trains with the doubled batch."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from amvl_fast import AMVLModel
from amvl_fast.training import load_run, read_config, train

from .conftest import TRAIN_IMAGES, settings_for
from .trajectories import PLAIN, assert_same_trajectory, evaluations, logs, same, weights

DRIVER = Path(__file__).with_name("processes.py")
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 1}
TWO = EVALUATED | {"per_device_train_batch_size": 4}
# Past the first epoch, of rows that do not fill whole steps.
UNEVEN = {"rows": 20, "max_steps": 6, "eval_strategy": "no"}
GROUPED = {"train_sampling_strategy": "batch_rebalance"}
SHARDED = TWO | {"fsdp": True}
# With moments to be saved; and far from where Adam makes large steps of gradients that are rounding.
SAVED = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "adam_epsilon": 1e-3}
CHECKPOINTED = {"gradient_checkpointing": True}
# DeepSpeed has no float64. A tiny model would be kept whole without the threshold.
ZERO = {
    stage: TWO
    | CHECKPOINTED
    | {
        "deepspeed": {
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_optimization": {
                "stage": stage,
                "stage3_param_persistence_threshold": 0,
                "stage3_gather_16bit_weights_on_model_save": True,
            },
        }
    }
    for stage in (2, 3)
}
LORA = {"r": 2, "lora_alpha": 4}


ROOT = Path(__file__).parents[2]


class Runs:
    """Runs by name, each in a directory of its own."""

    def __init__(self, inputs, root):
        self.inputs, self.root = inputs, root

    def __getitem__(self, name):
        return self.root / name

    def file(
        self, name, objective="amvl", lora=None, dtype="float64", streaming=False, cache=None, rows=None, **training
    ):
        """The YAML file of a run."""
        settings = settings_for(self.inputs, self[name])
        settings["objective"]["name"] = objective
        settings["model"]["dtype"] = dtype
        settings["data"] |= {"streaming": streaming, "shuffle_buffer": 7}
        settings["data"]["max_rows"] = rows
        settings["data"]["vision_cache"] = None if cache is None else str(self[cache])
        settings["training"] |= PLAIN | {"max_steps": 4, "per_device_train_batch_size": 8, **training}
        if lora:
            settings["lora"] = lora
        path = self.root / f"{name}.yaml"
        path.write_text(yaml.safe_dump(settings))
        return path

    def alone(self, name, **options):
        """In this process."""
        assert train(read_config(self.file(name, **options))) is None

    def together(self, **jobs):
        """By name with options, one after the other in the same two processes."""
        files = [str(self.file(name, **options)) for name, options in jobs.items()]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(DRIVER)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        arguments = [word for file in files for word in (file, "--")]
        done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr

    def half(self, name, source, step=2):
        """Another run's directory as it was after some steps."""
        for part in ("amvl_run.json", f"checkpoint-{step}"):
            kind = shutil.copytree if (self[source] / part).is_dir() else shutil.copy
            self[name].mkdir(exist_ok=True)
            kind(self[source] / part, self[name] / part)


@pytest.fixture(scope="module")
def runs(inputs, tmp_path_factory):
    runs = Runs(inputs, tmp_path_factory.mktemp("runs"))
    runs.alone("one", **EVALUATED)
    runs.alone("one_uneven", **UNEVEN)
    runs.alone("one_uneven_grouped", **UNEVEN | GROUPED)
    runs.alone("one_plain", objective="no_latents")
    runs.alone("one_lora", lora=LORA)
    runs.alone("one_float32", dtype="float32")
    # Once asked for, FSDP stays on in these processes (accelerate keeps it in their environment), so it comes later.
    runs.together(
        ddp=TWO,
        ddp_saved=TWO | SAVED,
        ddp_accumulated=TWO | {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        ddp_checkpointed=TWO | CHECKPOINTED,
        ddp_plain=TWO | {"objective": "no_latents"},
        ddp_lora=TWO | {"lora": LORA},
        ddp_streamed=TWO | {"streaming": True},
        ddp_cached=TWO | {"cache": "cache"},
        ddp_grouped=TWO | GROUPED,
        ddp_uneven=TWO | UNEVEN,
        ddp_uneven_grouped=TWO | UNEVEN | GROUPED | {"save_strategy": "steps", "save_steps": 2},
        fsdp=SHARDED,
        fsdp_saved=SHARDED | SAVED,
        fsdp_accumulated=SHARDED | {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        fsdp_checkpointed=SHARDED | CHECKPOINTED,
        fsdp_own_checkpoints=SHARDED | {"fsdp_config": {"activation_checkpointing": True}},
        fsdp_plain=SHARDED | {"objective": "no_latents"},
        fsdp_lora=SHARDED | CHECKPOINTED | {"lora": LORA},
        fsdp_cached=SHARDED | CHECKPOINTED | {"cache": "cache", "dataloader_num_workers": 1},
        **{f"zero{stage}": ZERO[stage] | {"dtype": "float32"} for stage in ZERO},
        **{f"zero{stage}_saved": ZERO[stage] | SAVED | {"dtype": "float32"} for stage in ZERO},
    )
    runs.alone("one_streamed", streaming=True)
    for name in ("ddp", "fsdp", "zero2", "zero3"):
        runs.half(f"{name}_resumed", f"{name}_saved")
    runs.half("grouped_resumed", "ddp_uneven_grouped", step=4)
    runs.half("fsdp_from_ddp", "ddp_saved")
    runs.together(
        ddp_resumed=TWO | SAVED,
        grouped_resumed=TWO | UNEVEN | GROUPED | {"save_strategy": "steps", "save_steps": 2},
        fsdp_resumed=SHARDED | SAVED,
        fsdp_from_ddp=SHARDED | SAVED,
        **{f"zero{stage}_resumed": ZERO[stage] | SAVED | {"dtype": "float32"} for stage in ZERO},
    )
    runs.half("one_from_fsdp", "fsdp_saved")
    runs.alone("one_from_fsdp", **EVALUATED, **SAVED)
    return runs


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
@pytest.mark.parametrize("way", ["", "_accumulated", "_checkpointed", "_plain", "_lora"])
def test_two_processes_train_what_one_does(runs, engine, way):
    expected = f"one{way}" if way in ("_plain", "_lora") else "one"
    assert_same_trajectory(runs[engine + way], runs[expected])


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_deepspeed_trains_what_one_process_does(runs, engine):
    assert_same_trajectory(runs[engine], runs["one_float32"], tolerance=2e-5)


def test_checkpointing_by_the_engine_changes_nothing(runs):
    assert_same_trajectory(runs["fsdp_own_checkpoints"], runs["one"])


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_a_vision_cache_changes_nothing(runs, engine):
    assert_same_trajectory(runs[f"{engine}_cached"], runs["one"])
    assert len(list(runs["cache"].rglob("*.safetensors"))) == TRAIN_IMAGES


def test_grouping_by_length_over_processes_changes_nothing(runs):
    assert_same_trajectory(runs["ddp_grouped"], runs["one"])


@pytest.mark.parametrize("name", ["uneven", "uneven_grouped"])
def test_epochs_that_do_not_divide_change_nothing(runs, name):
    assert_same_trajectory(runs[f"ddp_{name}"], runs[f"one_{name}"])


def test_grouped_rows_go_on_in_the_order_of_their_epoch(runs):
    assert same(weights(runs["grouped_resumed"]), weights(runs["ddp_uneven_grouped"]))


def test_streams_are_dealt_to_processes(runs):
    """Past the stream's end, too: four steps of eight, of 24 rows."""
    assert_same_trajectory(runs["ddp_streamed"], runs["one_streamed"])
    assert logs(runs["one_streamed"]) != logs(runs["one"])


@pytest.mark.parametrize("engine", ["ddp", "fsdp", "zero2", "zero3"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(runs, engine):
    assert same(weights(runs[f"{engine}_resumed"]), weights(runs[f"{engine}_saved"]))
    assert logs(runs[f"{engine}_resumed"]) == logs(runs[f"{engine}_saved"])


@pytest.mark.parametrize("name", ["fsdp_from_ddp", "one_from_fsdp"])
def test_a_checkpoint_is_any_engine_s(runs, name):
    assert_same_trajectory(runs[name], runs["ddp_saved"])


def test_evaluations_are_shared_and_the_same(runs):
    """Accuracy, likelihoods, KLs and active units of the same rows, with the same noise."""
    expected = evaluations(runs["one"])
    assert len(expected) == 2 and expected[0]["eval_rows"] == 6
    for name in ("ddp", "fsdp"):
        for ours, theirs in zip(evaluations(runs[name]), expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", ["ddp", "fsdp", "fsdp_lora"])
def test_what_several_processes_train_loads_in_one(runs, name):
    model, _, _ = load_run(runs[name])
    assert isinstance(model, AMVLModel)
    assert not any("lora" in parameter for parameter, _ in model.named_parameters())


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2", "zero3"])
def test_the_shipped_engines_train(engine, inputs, tmp_path):
    """By accelerate's launcher and with the command of the file, but on two processes of the CPU."""
    runs = Runs(inputs, tmp_path)
    run = runs.file("run", dtype="float32", per_device_train_batch_size=4)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"configs/engines/{engine}.yaml"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*command, "--num_processes", "2", str(DRIVER), str(run)],
        env=environment | {"DS_ACCELERATOR": "cpu"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    runs.alone("one", dtype="float32")
    assert_same_trajectory(runs["run"], runs["one"], tolerance=2e-5)

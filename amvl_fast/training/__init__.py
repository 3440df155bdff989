"""Training runs: their YAML, the trainer, and checkpoints that are whole or absent."""

from amvl_fast.training.arguments import AMVLTrainingArguments
from amvl_fast.training.config import RunConfig, read_config
from amvl_fast.training.loading import load_run, read_run_file
from amvl_fast.training.run import train
from amvl_fast.training.trainer import AMVLTrainer

__all__ = ["AMVLTrainer", "AMVLTrainingArguments", "RunConfig", "load_run", "read_config", "read_run_file", "train"]

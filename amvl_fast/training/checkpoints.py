"""Whole checkpoints or none: written aside, renamed when complete, and never on a disk too full to hold them."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from torch import nn
from transformers.trainer_utils import get_last_checkpoint

from amvl_fast.errors import AMVLError

ASIDE = ".unfinished"
# Moved last and in this order: what makes a directory look like a model, and a run look complete.
LAST = ("config.json", "trainer_state.json")
# What PyTorch says when a file cannot be written; other RuntimeErrors are not about the disk.
TORCH_WRITER = ("PytorchStreamWriter", "inline_container")


@contextlib.contextmanager
def written_aside(run_dir: Path) -> Iterator[Path]:
    """A fresh directory below `run_dir` whose entries are moved into `run_dir` once the block has ended well.

    Raises:
        AMVLError: writing failed, as it does on a full disk; `run_dir` is as it was.
    """
    aside = run_dir / ASIDE
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        for entry in sorted(aside.iterdir(), key=lambda entry: LAST.index(entry.name) if entry.name in LAST else -1):
            target = run_dir / entry.name
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(entry, target)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors wrap what the disk says
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in TORCH_WRITER):
            raise
        last = newest(run_dir)
        kept = f"the checkpoint before it, {last}, is whole" if last else "there was none before it"
        raise AMVLError(
            f"The checkpoint could not be written below {run_dir} ({error}); {kept}: "
            "free space and run the same command again."
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def newest(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run, if there is any."""
    last = get_last_checkpoint(str(run_dir)) if run_dir.is_dir() else None
    return Path(last) if last else None


def require_space(run_dir: Path, model: nn.Module) -> None:
    """Refuse to start where one checkpoint does not fit: weights and, for trained ones, two Adam moments.

    Raises:
        AMVLError: with the sizes.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    sizes = [p.numel() * p.element_size() * (3 if p.requires_grad else 1) for p in model.parameters()]
    needed, free = sum(sizes), shutil.disk_usage(run_dir).free
    if free < needed:
        raise AMVLError(
            f"{run_dir} has {free / 2**20:,.0f} MiB free, but one checkpoint takes {needed / 2**20:,.0f} MiB; "
            "free space or choose another training.output_dir."
        )

"""Whole checkpoints or none: written aside, synced, renamed, and known to be whole by a list of what they hold."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from amvl_fast.errors import AMVLError

ASIDE = ".unfinished"
# What a checkpoint holds: {"files": {name: [bytes, crc32]}, ...}. A directory without it was not written to its end.
MANIFEST = "checkpoint.json"
# Moved last and in this order: what makes a directory look like a model, and a run look complete.
LAST = ("config.json", "trainer_state.json")
# What PyTorch says when a file cannot be written; other RuntimeErrors are not about the disk.
TORCH_WRITER = ("PytorchStreamWriter", "inline_container")
BLOCK = 2**24


@contextlib.contextmanager
def written_aside(
    run_dir: Path, facts: dict[str, Any], *, is_main: bool = True, wait: Callable[[], Any] = lambda: None
) -> Iterator[Path]:
    """A fresh directory below `run_dir` whose entries are moved into `run_dir` once the block has ended well.

    Args:
        run_dir: the directory of the run.
        facts: written into the manifest of each checkpoint in the block.
        is_main: whether this process makes and moves the directory; the others write into it.
        wait: lets every process arrive before any goes on.

    Raises:
        AMVLError: writing failed, as it does on a full disk; `run_dir` is as it was.
    """
    aside = run_dir / ASIDE
    try:
        if is_main:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        wait()
        if not aside.is_dir():
            raise AMVLError(f"{run_dir} is not on a file system that all machines share; choose one that is.")
        yield aside
        wait()
        if is_main:
            for checkpoint in aside.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
                write_manifest(checkpoint, facts)
            _sync(aside)
            _move(aside, run_dir)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors wrap what the disk says
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in TORCH_WRITER):
            raise
        last = newest(run_dir, say=lambda message: None)
        kept = f"the checkpoint before it, {last}, is whole" if last else "there was none before it"
        raise AMVLError(
            f"The checkpoint could not be written below {run_dir} ({error}); {kept}: "
            "free space and run the same command again."
        ) from error
    finally:
        if is_main:
            shutil.rmtree(aside, ignore_errors=True)
    wait()


def _move(aside: Path, run_dir: Path) -> None:
    for entry in sorted(aside.iterdir(), key=lambda entry: LAST.index(entry.name) if entry.name in LAST else -1):
        target = run_dir / entry.name
        if target.is_dir():
            if damage(target) is None:
                continue  # of the same step; there is no moment at which neither is there
            shutil.rmtree(target)
        os.replace(entry, target)
    _sync_entry(run_dir)


def _sync(directory: Path) -> None:
    """Everything below a directory, itself included, onto the disk."""
    for path in directory.rglob("*"):
        _sync_entry(path)
    _sync_entry(directory)


def _sync_entry(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_manifest(checkpoint: Path, facts: dict[str, Any]) -> None:
    """List what a checkpoint holds."""
    names = sorted(str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file())
    with ThreadPoolExecutor() as pool:
        sums = pool.map(lambda name: _checksum(checkpoint / name), names)
        files = {name: [(checkpoint / name).stat().st_size, sum] for name, sum in zip(names, sums, strict=True)}
    (checkpoint / MANIFEST).write_text(json.dumps({**facts, "files": files}, indent=1) + "\n")


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """What `write_manifest` wrote; empty where there is none that can be read."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        return manifest if isinstance(manifest.get("files"), dict) else {}
    except (OSError, ValueError, AttributeError):
        return {}


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, in words; None if they are what was written."""
    files = read_manifest(checkpoint).get("files")
    if not files:
        return f"its {MANIFEST} is missing or cannot be read"
    for name, (size, _) in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} of {size:,} bytes"
    with ThreadPoolExecutor() as pool:
        sums = dict(zip(files, pool.map(lambda name: _checksum(checkpoint / name), files), strict=True))
    return next((f"{name} is not what was written" for name in files if sums[name] != files[name][1]), None)


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            value = zlib.crc32(block, value)
    return value


def step_of(checkpoint: Any) -> int:
    """The step that a checkpoint's directory is named after; 0 for none."""
    number = str(checkpoint or "").rstrip("/").rpartition("-")[2]
    return int(number) if number.isdigit() else 0


def numbered(run_dir: Path) -> list[tuple[int, Path]]:
    """Directories of checkpoints, whole or not, with their steps, in that order."""
    found = [path for path in run_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir() and step_of(path)]
    return sorted((step_of(path), path) for path in found)


def newest(run_dir: Path, say: Callable[[str], Any] = print) -> Path | None:
    """The newest whole checkpoint of a run, if there is any; says which ones are passed over, and why."""
    for _, checkpoint in reversed(numbered(run_dir)):
        problem = damage(checkpoint)
        if problem is None:
            return checkpoint
        say(f"{checkpoint} is passed over, because {problem}.")
    return None


def require_space(run_dir: Path, model: nn.Module) -> None:
    """Refuse to start where one checkpoint does not fit: weights and, for trained ones, two Adam moments.

    Of a model with adapters what is trained is all.

    Raises:
        AMVLError: with the sizes.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    frozen = 0 if isinstance(getattr(model, "peft_config", None), dict) else 1
    sizes = [p.numel() * p.element_size() * (3 if p.requires_grad else frozen) for p in model.parameters()]
    # What a run that was killed left behind is cleared before anything is written.
    left = sum(path.stat().st_size for path in (run_dir / ASIDE).rglob("*") if path.is_file())
    needed, free = sum(sizes), shutil.disk_usage(run_dir).free + left
    if free < needed:
        raise AMVLError(
            f"{run_dir} has {free / 2**20:,.1f} MiB free, but one checkpoint takes {needed / 2**20:,.1f} MiB; "
            "free space or choose another training.output_dir."
        )

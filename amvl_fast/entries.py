"""Tensors on disk by key: each entry whole or absent, whoever writes at the same time and whoever is killed."""

from __future__ import annotations

import contextlib
import os
import secrets
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from amvl_fast.errors import AMVLError


class Entries:
    """Dictionaries of tensors in a directory, each in a file of its own.

    A file is written aside, synced and renamed; one who is killed leaves at most a hidden file that nobody reads. Its
    checksum is over all that it holds, its key included.

    Args:
        directory: created with the first entry.
        option: by which the user chose the directory, to be named in messages.
    """

    def __init__(self, directory: str | os.PathLike[str], option: str) -> None:
        self.directory, self.option = Path(directory), option

    def path(self, key: str) -> Path:
        """Of the file; keys are hexadecimal."""
        return self.directory / key[:2] / f"{key[2:]}.safetensors"

    def read(self, key: str) -> dict[str, Tensor] | None:
        """What was written, on the CPU; None if there is no such entry.

        Raises:
            AMVLError: the entry is not what was written.
        """
        path = self.path(key)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                told = (file.metadata() or {}).get("crc32")
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, SafetensorError, ValueError, RuntimeError) as error:
            raise AMVLError(f"{path} cannot be read ({error}); remove it and run the same command again.") from error
        if told != checksum(key, tensors):
            raise AMVLError(f"{path} is not what was written; remove it and run the same command again.")
        return tensors

    def is_whole(self, key: str) -> bool:
        """Whether `read` would give it."""
        try:
            return self.read(key) is not None
        except AMVLError:
            return False

    def write(self, key: str, tensors: dict[str, Tensor]) -> None:
        """Put an entry in place, instead of one that is there.

        Raises:
            AMVLError: the disk is full, for example; the directory is as it was.
        """
        path, tensors = self.path(key), {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        aside = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(8)}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with aside.open("xb") as file:
                file.write(save(tensors, {"crc32": checksum(key, tensors)}))
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        except OSError as error:
            raise AMVLError(
                f"{self.option}: {self.directory} cannot be written to ({error}); free space or choose another "
                "directory, and run the same command again."
            ) from error
        finally:
            with contextlib.suppress(OSError):
                aside.unlink()


def checksum(key: str, tensors: dict[str, Tensor]) -> str:
    """Of an entry: key, names, dtypes, shapes and bytes."""
    value = zlib.crc32(key.encode())
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        value = zlib.crc32(as_bytes(tensor), value)
    return f"{value:08x}"


def as_bytes(tensor: Tensor) -> Any:
    """A buffer of a tensor's bytes."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()

"""Builds of the C++ kernels from a copy of the checkout."""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from latent_ops import NO_COMPILER, lacks_compiler

CHECKOUT = Path(__file__).resolve().parents[1]

needs_compiler = pytest.mark.skipif(lacks_compiler("cpu"), reason=NO_COMPILER)


def copy_of_checkout(folder: Path) -> Path:
    """Sources to build, with a library that an earlier build left."""
    checkout = folder / "checkout"
    for name in ("amvl_fast", "kernels"):
        shutil.copytree(CHECKOUT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, checkout)
    (checkout / "kernels" / "cpu" / "libamvl_fast.so").write_text("old")
    return checkout


def build(checkout: Path, *command: str, setup: Sequence[str] = ("setup.py",), **environment: str) -> str:
    """What the build prints."""
    result = subprocess.run(
        [sys.executable, *setup, *command],
        cwd=checkout,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def load(folder: Path):
    """The package of the kernels in this folder, with the library beside it."""
    specification = importlib.util.spec_from_file_location("other", folder / "__init__.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module

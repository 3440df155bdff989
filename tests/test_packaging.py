"""The kernels install inside `amvl_fast` and stay out of the way of Hugging Face's package `kernels`."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

import amvl_fast

CHECKOUT = Path(__file__).resolve().parents[1]


def run_python(code: str, *path: Path, cwd: Path) -> str:
    """What a fresh interpreter prints, with these folders first on its path."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_a_checkout_does_not_shadow_a_package_named_kernels(tmp_path):
    package = tmp_path / "site" / "kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("WHOSE = 'theirs'\n")
    # The checkout comes first twice: as the working directory and on the path.
    assert run_python("import kernels; print(kernels.WHOSE)", CHECKOUT, package.parent, cwd=CHECKOUT) == "theirs"


def test_a_checkout_does_not_make_transformers_see_kernels():
    code = "from transformers.utils import is_kernels_available; print(is_kernels_available())"
    assert run_python(code, CHECKOUT, cwd=CHECKOUT) == run_python(code, cwd=Path(CHECKOUT.anchor))


def test_kernels_are_no_package():
    assert not (CHECKOUT / "kernels" / "__init__.py").exists()


def test_kernels_import_outside_the_checkout(tmp_path):
    """Inside it the other tests do."""
    pytest.importorskip("triton")
    code = "import amvl_fast.kernels.triton as kernels; print(kernels.__name__)"
    assert run_python(code, cwd=tmp_path) == "amvl_fast.kernels.triton"


def test_types_are_announced():
    assert (Path(amvl_fast.__file__).parent / "py.typed").exists()


def test_one_version():
    assert importlib.metadata.version("amvl-fast") == amvl_fast.__version__

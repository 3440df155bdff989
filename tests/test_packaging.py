"""The kernels install inside `amvl_fast` and stay out of the way of Hugging Face's package `kernels`.

And the library of the C++ kernels: how it is built, and an installation that has to do without it.
"""

import ctypes
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from cpu_builds import CHECKOUT, build, copy_of_checkout, load, needs_compiler

import amvl_fast


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


# --- without the library, or with another one ---

REPORT = """
import json, torch, amvl_fast
from amvl_fast import doctor
x = torch.ones(2, 3)
automatic = amvl_fast.gaussian_dual_kl(x, x, x, x, seed=1)
same = all(map(torch.equal, automatic, amvl_fast.gaussian_dual_kl(x, x, x, x, seed=1, backend="torch")))
try:
    error = str(amvl_fast.gaussian_dual_kl(x, x, x, x, seed=1, backend="cpu"))
except amvl_fast.errors.AMVLError as refusal:
    error = f"AMVLError: {refusal}"
print(json.dumps([amvl_fast.__file__, doctor.report(), same, error]))
"""


def assert_missing(site: Path, reason: str):
    """The package that is installed there works, without the cpu backend, and says why."""
    environment = {name: value for name, value in os.environ.items() if name != "AMVL_FAST_BACKEND"}
    result = subprocess.run(
        [sys.executable, "-c", REPORT],
        cwd=site,
        env={**environment, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    file, doctor, same_as_torch, error = json.loads(result.stdout)
    assert file.startswith(str(site))
    (line,) = [line for line in doctor.splitlines() if line.startswith("backend cpu")]
    assert "missing" in line and reason in line and "install" in line
    assert same_as_torch
    assert error.startswith("AMVLError: backend='cpu' cannot run here") and reason in error and "install" in error
    assert "\n" not in error and error.endswith(".")


@pytest.fixture
def site(tmp_path):
    """The package as an installation without the library leaves it."""
    without = shutil.ignore_patterns("__pycache__", "*.so", "*.cpp", "*.h")
    shutil.copytree(CHECKOUT / "amvl_fast", tmp_path / "amvl_fast", ignore=without)
    shutil.copytree(CHECKOUT / "kernels" / "cpu", tmp_path / "amvl_fast" / "kernels" / "cpu", ignore=without)
    return tmp_path


def test_without_the_library(site):
    assert_missing(site, "library is missing")


@needs_compiler
def test_a_library_of_other_sources_is_refused(site):
    """One with another number, and one so old that it has none."""
    compiler = next(path for name in ("c++", "g++", "clang++") if (path := shutil.which(name)))
    folder = site / "amvl_fast" / "kernels" / "cpu"
    for source in ('extern "C" int amvl_interface() { return -1; }', ""):
        (site / "other.cpp").write_text(source)
        (folder / "libamvl_fast.so").unlink(missing_ok=True)
        command = [compiler, "-shared", "-fPIC", site / "other.cpp", "-o", folder / "libamvl_fast.so"]
        subprocess.run(command, check=True)
        with pytest.raises(ImportError, match="built from other sources"):
            load(folder)
    assert_missing(site, "built from other sources")


# --- the build ---


@pytest.fixture
def checkout(tmp_path):
    return copy_of_checkout(tmp_path)


def test_a_build_without_a_compiler_leaves_the_kernels_out(checkout, tmp_path):
    failing = tmp_path / "failing"
    failing.write_text("#!/bin/sh\nexit 1\n")
    failing.chmod(0o755)
    for compiler in ("/nonexistent", str(failing)):
        build(checkout, "bdist_wheel", CC=compiler, CXX=compiler)
        (wheel,) = (checkout / "dist").glob("*.whl")
        names = zipfile.ZipFile(wheel).namelist()
        assert "amvl_fast/kernels/cpu/__init__.py" in names
        assert not any(name.endswith(".so") for name in names)
    # As for an editable install: the old library must not pass for a new one.
    build(checkout, "build_ext", "--inplace", CC=compiler, CXX=compiler)
    assert not (checkout / "kernels" / "cpu" / "libamvl_fast.so").exists()


@needs_compiler
def test_a_wheel_has_the_library_and_not_its_sources(checkout, tmp_path):
    build(checkout, "bdist_wheel")
    (wheel,) = (checkout / "dist").glob("*.whl")
    assert "-py3-none-" in wheel.name and not wheel.name.endswith("-any.whl")
    archive = zipfile.ZipFile(wheel)
    assert {Path(name).suffix for name in archive.namelist() if "/kernels/cpu/" in name} == {".py", ".so"}
    library = archive.extract("amvl_fast/kernels/cpu/libamvl_fast.so", tmp_path)
    from amvl_fast.kernels import cpu

    assert ctypes.CDLL(library).amvl_interface() == cpu._INTERFACE

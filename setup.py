"""Which folder becomes which package, and how the C++ kernels are built; everything else is in pyproject.toml.

`kernels/` is installed inside `amvl_fast`, one sub-package at a time. The folder itself is mapped nowhere and
has no `__init__.py`: with one, a checkout on `sys.path` would shadow the package `kernels` that transformers
imports. The parent that the sub-packages are installed into, `amvl_fast/kernels/__init__.py`, must exist: an
editable install maps packages, not the namespace above them.
"""

import os
import platform
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

FLAGS = [
    *["-O3", "-std=c++17", "-fno-exceptions", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"],
    *["-g0", "-w"],
]

# The same source once for each instruction set; interface.cpp chooses among them at run time.
INSTRUCTIONS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    avx2 = ["-mavx2", "-mfma"]
    INSTRUCTIONS |= {
        "avx2": avx2,
        "avx512": [*avx2, "-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bw"],
    }


class BuildKernels(build_ext):
    """A plain shared library, called through ctypes: the headers of neither Python nor PyTorch take part.

    Optional: where it cannot be built the package installs without it, and `amvl-fast doctor` says so.
    """

    def get_ext_filename(self, name):
        return os.path.join(*name.split(".")) + ".so"

    def get_export_symbols(self, extension):
        return []

    def build_extension(self, extension):
        library = Path(self.get_ext_fullpath(extension.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        library.unlink(missing_ok=True)  # or, if this build fails, an earlier one's would be packaged
        kernels, interface = extension.sources
        objects = []
        for name, flags in INSTRUCTIONS.items():
            objects += self.compile(extension, kernels, flags, os.path.join(self.build_temp, name), name)
        # The runtime that PyTorch uses, whose threads are then shared, goes by the same name on Linux. Clang has
        # OpenMP in a package of its own: without it the library computes in one thread.
        for openmp in [["-fopenmp"], []] if sys.platform == "linux" else [[]]:
            try:
                # The C++ runtime linked in: a system's own may be older than the one that PyTorch brings, or newer.
                self.compiler.link_shared_object(
                    objects + self.compile(extension, interface, openmp, self.build_temp),
                    str(library),
                    extra_postargs=[*openmp, "-static-libstdc++", "-static-libgcc"],
                    target_lang="c++",
                )
                return
            except (CompileError, LinkError):
                if not openmp:
                    raise

    def compile(self, extension, source, flags, folder, instructions=None):
        macros = [("INSTRUCTIONS", instructions)] if instructions else []
        return self.compiler.compile(
            [source],
            output_dir=folder,
            macros=macros,
            extra_postargs=[*FLAGS, *flags],
            depends=extension.depends,
        )

    def copy_extensions_to_source(self):
        """Of an editable install, whose library stands beside the sources."""
        for extension in self.extensions:
            package, _, library = extension.name.rpartition(".")
            folder = self.get_finalized_command("build_py").get_package_dir(package)
            Path(folder, f"{library}.so").unlink(missing_ok=True)
        super().copy_extensions_to_source()


class PlatformWheel(bdist_wheel):
    """For this platform and any Python: the library is called through ctypes, whatever the interpreter's version."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(
    packages=[
        *find_packages(include=["amvl_fast", "amvl_fast.*"]),
        "amvl_fast.kernels.cpu",
        "amvl_fast.kernels.triton",
    ],
    package_dir={"amvl_fast.kernels.cpu": "kernels/cpu", "amvl_fast.kernels.triton": "kernels/triton"},
    # Not what MANIFEST.in lists: that is for the sdist, and an installed package needs no C++ sources.
    include_package_data=False,
    package_data={"amvl_fast": ["py.typed"]},
    ext_modules=[
        Extension(
            "amvl_fast.kernels.cpu.libamvl_fast",
            ["kernels/cpu/kernels.cpp", "kernels/cpu/interface.cpp"],
            depends=sorted(map(str, Path("kernels/cpu").glob("*.h"))),
            language="c++",
            optional=True,
        )
    ],
    cmdclass={"bdist_wheel": PlatformWheel, "build_ext": BuildKernels},
)

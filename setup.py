"""Which folder becomes which package, and how the C++ kernels are built; everything else is in pyproject.toml.

`kernels/` is installed inside `amvl_fast`, one sub-package at a time. The folder itself is mapped nowhere and
has no `__init__.py`: with one, a checkout on `sys.path` would shadow the package `kernels` that transformers
imports. The parent that the sub-packages are installed into, `amvl_fast/kernels/__init__.py`, must exist: an
editable install maps packages, not the namespace above them.
"""

import os
import platform
import sys

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, ExecError, PlatformError

FLAGS = [
    *["-O3", "-std=c++17", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-g0", "-w"],
    # Interleaves independent vectors: the kernels are bound by the latency of their chains, not by their number.
    *["-fschedule-insns", "-fsched-pressure"],
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
        # The runtime that PyTorch uses, whose threads are then shared, goes by the same name on Linux.
        openmp = ["-fopenmp"] if sys.platform == "linux" else []
        try:
            self.build_library(extension, openmp)
        except (CCompilerError, ExecError, PlatformError) as error:
            print(f"amvl-fast: the C++ kernels are left out, for they could not be built ({error})", file=sys.stderr)

    def build_library(self, extension, openmp):
        kernels, interface = extension.sources
        objects = []
        for name, flags in INSTRUCTIONS.items():
            objects += self.compiler.compile(
                [kernels],
                output_dir=os.path.join(self.build_temp, name),
                macros=[("INSTRUCTIONS", name)],
                extra_postargs=[*FLAGS, *flags],
                depends=extension.depends,
            )
        objects += self.compiler.compile(
            [interface], output_dir=self.build_temp, extra_postargs=[*FLAGS, *openmp], depends=extension.depends
        )
        library = self.get_ext_fullpath(extension.name)
        os.makedirs(os.path.dirname(library), exist_ok=True)
        # The C++ runtime linked in: a system's own may be older than the one that PyTorch brings, or newer.
        self.compiler.link_shared_object(
            objects, library, extra_postargs=[*openmp, "-static-libstdc++", "-static-libgcc"], target_lang="c++"
        )


HEADERS = [
    "exponential",
    "gaussian_dual_kl",
    "gaussian_noise",
    "kernels",
    "layout",
    "philox",
    "sample_gaussian",
    "vector",
]

setup(
    packages=[
        *find_packages(include=["amvl_fast", "amvl_fast.*"]),
        "amvl_fast.kernels.cpu",
        "amvl_fast.kernels.triton",
    ],
    package_dir={"amvl_fast.kernels.cpu": "kernels/cpu", "amvl_fast.kernels.triton": "kernels/triton"},
    package_data={"amvl_fast": ["py.typed"]},
    ext_modules=[
        Extension(
            "amvl_fast.kernels.cpu.libamvl_fast",
            ["kernels/cpu/kernels.cpp", "kernels/cpu/interface.cpp"],
            depends=[f"kernels/cpu/{name}.h" for name in HEADERS],
            language="c++",
        )
    ],
    cmdclass={"build_ext": BuildKernels},
)

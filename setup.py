"""Which folder becomes which package; everything else about the project is in pyproject.toml.

`kernels/` is installed inside `amvl_fast`, one sub-package at a time. The folder itself is mapped nowhere and
has no `__init__.py`: with one, a checkout on `sys.path` would shadow the package `kernels` that transformers
imports. The parent that the sub-packages are installed into, `amvl_fast/kernels/__init__.py`, must exist: an
editable install maps packages, not the namespace above them.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["amvl_fast", "amvl_fast.*"]), "amvl_fast.kernels.triton"],
    package_dir={"amvl_fast.kernels.triton": "kernels/triton"},
    package_data={"amvl_fast": ["py.typed"]},
)

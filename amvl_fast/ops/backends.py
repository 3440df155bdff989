"""Which implementation runs an op, and why one cannot.

`"triton"` runs the GPU kernels: on CUDA tensors, or on CPU tensors under Triton's interpreter, for tests. `"cpu"` runs
the C++ kernels on CPU tensors. `"torch"` is plain PyTorch and runs everywhere. A backend that is asked for by name, in
a call or in the environment variable `AMVL_FAST_BACKEND`, runs or raises; only the automatic choice chooses.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from amvl_fast.errors import AMVLError

BACKENDS = ("triton", "cpu", "torch")
ENVIRONMENT_VARIABLE = "AMVL_FAST_BACKEND"

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@cache
def _import_kernels(name: str) -> ModuleType | str:
    """The package of a backend's kernels, or the reason why it cannot be imported."""
    if name == "triton":
        try:
            import triton  # noqa: F401
        except ImportError as error:
            return f"Triton cannot be imported ({error}); it is published for Linux only: pip install triton"
    try:
        return import_module(f"amvl_fast.kernels.{name}")
    except ModuleNotFoundError as error:
        return f"its kernels are not installed ({error}): pip install amvl-fast, or -e . in a checkout"
    except OSError as error:
        return f"its library is missing ({error}): install amvl-fast from source where there is a C++ compiler"
    except (ImportError, AttributeError) as error:
        return (
            f"its kernels and what they load are of different versions ({error}): "
            "reinstall amvl-fast, with pip install -e . in a checkout"
        )


@cache
def kernels_of(name: str) -> ModuleType:
    """The package of a backend's kernels; call it only where `choose_backend` gave that name."""
    kernels = _import_kernels(name)
    assert isinstance(kernels, ModuleType), kernels
    return kernels


def backend_status() -> dict[str, str | None]:
    """Every backend by name, with None where it is available here and otherwise the reason why it is not."""
    status: dict[str, str | None] = {}
    for name in BACKENDS:
        kernels = None if name == "torch" else _import_kernels(name)
        status[name] = kernels if isinstance(kernels, str) else None
    if status["triton"] is None and not torch.cuda.is_available() and not kernels_of("triton").INTERPRETED:
        status["triton"] = (
            "PyTorch sees no CUDA device (TRITON_INTERPRET=1, set before the program starts, "
            "runs the kernels on the CPU, for tests)"
        )
    return status


# torch.compile takes the answer as it is instead of tracing how it is found.
@torch.compiler.assume_constant_result
def _why_not_on(name: str, device: str) -> str | None:
    """Why a backend cannot run on a type of device, or None if it can."""
    return _find_why_not_on(name, device)


@cache
def _find_why_not_on(name: str, device: str) -> str | None:
    if name == "torch":
        return None
    reason = backend_status()[name]
    if reason is not None:
        return reason
    if name == "cpu" and device != "cpu":
        return f"its kernels run on the CPU and these tensors are on {device}: move them there"
    if name == "triton" and device != "cuda" and not (device == "cpu" and kernels_of("triton").INTERPRETED):
        return f"its kernels run on CUDA devices and these tensors are on {device}: move them there"
    return None


def _why_not(name: str, tensors: Sequence[Tensor], device: torch.device) -> str | None:
    """Why a backend cannot take these tensors, or None if it can."""
    reason = _why_not_on(name, device.type)
    if reason is None and name != "torch":
        for tensor in tensors:
            if tensor.dtype not in _KERNEL_DTYPES:
                return f"its kernels take float32, bfloat16 and float16, not {tensor.dtype}: use backend='torch'"
    return reason


def choose_backend(name: str | None, tensors: Sequence[Tensor], device: torch.device) -> str:
    """The backend that will run an op on these tensors.

    Args:
        name: a backend's name, or None for the one named by `AMVL_FAST_BACKEND` or else the fastest.
        tensors: the op's floating inputs.
        device: where the op runs.

    Raises:
        AMVLError: if the name is unknown, or names a backend that cannot run here; the message says why.
    """
    origin = "backend"
    if name is None and os.environ.get(ENVIRONMENT_VARIABLE):
        name, origin = os.environ[ENVIRONMENT_VARIABLE], ENVIRONMENT_VARIABLE
    if name is None:
        # Each kind of device has one; the interpreter is for tests, so the automatic choice never takes it.
        fastest = "triton" if device.type == "cuda" else "cpu"
        return fastest if _why_not(fastest, tensors, device) is None else "torch"
    if name not in BACKENDS:
        raise AMVLError(f"{origin}={name!r} is not a backend: use one of {', '.join(map(repr, BACKENDS))}.")
    reason = _why_not(name, tensors, device)
    if reason is not None:
        raise AMVLError(f"{origin}={name!r} cannot run here: {reason}.")
    return name

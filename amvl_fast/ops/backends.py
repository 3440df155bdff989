"""Which implementation runs an op, and why one cannot.

`"torch"` is plain PyTorch and runs everywhere. `"triton"` runs the kernels: on CUDA tensors, or on CPU
tensors under Triton's interpreter, for tests. A backend that is asked for by name, in a call or in the
environment variable `AMVL_FAST_BACKEND`, runs or raises; only the automatic choice chooses.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from amvl_fast.errors import AMVLError

BACKENDS = ("triton", "torch")
ENVIRONMENT_VARIABLE = "AMVL_FAST_BACKEND"

_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@cache
def _import_kernels() -> ModuleType | str:
    """The package of Triton kernels, or the reason why it cannot be imported."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported ({error}); it is published for Linux only: pip install triton"
    try:
        import amvl_fast.kernels.triton as kernels
    except ImportError as error:
        return f"its kernels are not installed ({error}): pip install amvl-fast, or -e . in a checkout"
    return kernels


def triton_kernels() -> ModuleType:
    """The package of Triton kernels; call it only where `choose_backend` said `"triton"`."""
    kernels = _import_kernels()
    assert isinstance(kernels, ModuleType), kernels
    return kernels


def backend_status() -> dict[str, str | None]:
    """Every backend by name, with None where it is available here and otherwise the reason why it is not."""
    kernels = _import_kernels()
    triton_status: str | None = None
    if isinstance(kernels, str):
        triton_status = kernels
    elif not torch.cuda.is_available() and not kernels.INTERPRETED:
        triton_status = (
            "PyTorch sees no CUDA device (TRITON_INTERPRET=1, set before the program starts, "
            "runs the kernels on the CPU, for tests)"
        )
    return {"triton": triton_status, "torch": None}


def _why_not_triton(tensors: Sequence[Tensor], device: torch.device) -> str | None:
    """Why the Triton kernels cannot take these tensors, or None if they can."""
    reason = backend_status()["triton"]
    if reason is not None:
        return reason
    if device.type != "cuda" and not (device.type == "cpu" and triton_kernels().INTERPRETED):
        return f"its kernels run on CUDA devices and these tensors are on {device}: move them there"
    for tensor in tensors:
        if tensor.dtype not in _TRITON_DTYPES:
            return f"its kernels take float32, bfloat16 and float16, not {tensor.dtype}: use backend='torch'"
    return None


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
        # The interpreter is for tests, so the automatic choice never takes it.
        fast = device.type == "cuda" and _why_not_triton(tensors, device) is None
        return "triton" if fast else "torch"
    if name not in BACKENDS:
        raise AMVLError(f"{origin}={name!r} is not a backend: use one of {', '.join(map(repr, BACKENDS))}.")
    reason = _why_not_triton(tensors, device) if name == "triton" else None
    if reason is not None:
        raise AMVLError(f"{origin}={name!r} cannot run here: {reason}.")
    return name

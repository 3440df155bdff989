"""The C++ kernels of amvl_fast for CPU tensors: launchers over plain tensors that know nothing of models or autograd.

The same functions as in `amvl_fast.kernels.triton`. They trust their caller for everything that `amvl_fast.ops`
checks: one shape, CPU tensors, float32, bfloat16 or float16, contiguous sample ids. The library beside this file is
built by setup.py and called through ctypes; interface.cpp describes the array of integers that a call is.
"""

from __future__ import annotations

import ctypes
import math
import struct
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LIBRARY = Path(__file__).with_name("libamvl_fast.so")

# What interface.cpp calls itself: raised, there and here, whenever the two sides of a call change.
_INTERFACE = 3

_library = ctypes.CDLL(str(LIBRARY))
if not hasattr(_library, "amvl_interface") or _library.amvl_interface() != _INTERFACE:
    raise ImportError(f"{LIBRARY} was built from other sources than the package")
_library.amvl_instructions.restype = ctypes.c_char_p
for _name in ("dual_kl_forward", "dual_kl_backward", "sample_forward", "sample_backward", "noise", "words"):
    _function = getattr(_library, f"amvl_{_name}")
    _function.argtypes, _function.restype = [ctypes.c_void_p], None
_library.amvl_choose(None)

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int32: 0}

(_BITS_OF_ONE,) = struct.unpack("q", struct.pack("d", 1.0))

_MAX_DIMS = 64  # of kernels.h

# A thread is worth waking for this many elements: it takes about as long as their arithmetic.
_ELEMENTS_PER_THREAD = 4096
# Outputs from this size on do not stay in a cache until they are read, so they need not go through it.
_BYTES_PAST_CACHES = 8 << 20


def instructions() -> str:
    """The instruction set in use: `"avx512"`, `"avx2"` or `"baseline"`."""
    return _library.amvl_instructions().decode()


def use_instructions(name: str | None) -> bool:
    """Use the named instruction set, or the best one for None; false if this processor does not have it."""
    return bool(_library.amvl_choose(None if name is None else name.encode()))


def _call(
    function: Any,
    shape: Sequence[int],
    inputs: Sequence[Tensor | None],
    outputs: Sequence[Tensor | None],
    seed: Tensor,
    sample_ids: Tensor | None,
    *,
    row_inputs: Sequence[Tensor | None] = (),
    stream: int = 0,
    temperature: float = 1.0,
    stop_gradient: bool = True,
) -> None:
    """Run one kernel over tensors of the shape; `row_inputs` have one element per row and count as inputs too."""
    elements = math.prod(shape)
    if elements == 0:
        return
    dims = len(shape)
    if dims > _MAX_DIMS:
        raise ValueError(f"the C++ kernels take tensors of at most {_MAX_DIMS} dimensions, and this one has {dims}")
    absent = (0,) * (2 + dims)
    arguments = [
        min(torch.get_num_threads(), 1 + elements // _ELEMENTS_PER_THREAD),
        False,
        seed.data_ptr(),
        0 if sample_ids is None else sample_ids.data_ptr(),
        stream,
        _BITS_OF_ONE if temperature == 1.0 else struct.unpack("q", struct.pack("d", temperature))[0],
        stop_gradient,
        len(inputs) + len(row_inputs),
        len(outputs),
        dims - 1,
        *shape,
    ]
    for tensor in inputs:
        arguments += absent if tensor is None else (tensor.data_ptr(), _DTYPES[tensor.dtype], *tensor.stride())
    for tensor in row_inputs:
        arguments += absent if tensor is None else (tensor.data_ptr(), _DTYPES[tensor.dtype], *tensor.stride(), 0)
    written = 0
    for tensor in outputs:
        if tensor is None:
            arguments += (0, 0, 0)
        else:
            arguments += (tensor.data_ptr(), _DTYPES[tensor.dtype], tensor.nbytes)
            written += tensor.nbytes
    arguments[1] = written >= _BYTES_PAST_CACHES
    call = array("q", arguments)  # a name of its own, or it would be gone before the call
    function(call.buffer_info()[0])


def gaussian_dual_kl_forward(
    mean_q: Tensor,
    logvar_q: Tensor,
    mean_p: Tensor,
    logvar_p: Tensor,
    seed: Tensor,
    sample_ids: Tensor | None,
    z: Tensor,
    forward_kl: Tensor,
    reverse_kl: Tensor,
) -> None:
    """Write `z` `[..., d]` and the float32 KLs `[...]`, all contiguous; the inputs may have any strides."""
    if z.numel() == 0:
        forward_kl.zero_()
        reverse_kl.zero_()
        return
    inputs, outputs = (mean_q, logvar_q, mean_p, logvar_p), (z, forward_kl, reverse_kl)
    _call(_library.amvl_dual_kl_forward, z.shape, inputs, outputs, seed, sample_ids)


def gaussian_dual_kl_backward(
    mean_q: Tensor,
    logvar_q: Tensor,
    mean_p: Tensor,
    logvar_p: Tensor,
    seed: Tensor,
    sample_ids: Tensor | None,
    grad_z: Tensor | None,
    grad_forward_kl: Tensor | None,
    grad_reverse_kl: Tensor | None,
    grad_mean_q: Tensor | None,
    grad_logvar_q: Tensor | None,
    grad_mean_p: Tensor | None,
    grad_logvar_p: Tensor | None,
    *,
    stop_gradient: bool,
) -> None:
    """Write the gradients that are not None, contiguous. Upstream: None, or a tensor of any strides."""
    _call(
        _library.amvl_dual_kl_backward,
        mean_q.shape,
        (mean_q, logvar_q, mean_p, logvar_p, grad_z),
        (grad_mean_q, grad_logvar_q, grad_mean_p, grad_logvar_p),
        seed,
        sample_ids,
        row_inputs=(grad_forward_kl, grad_reverse_kl),
        stop_gradient=stop_gradient,
    )


def sample_gaussian_forward(
    mean: Tensor,
    logvar: Tensor,
    seed: Tensor,
    sample_ids: Tensor | None,
    temperature: float,
    stream: int,
    z: Tensor,
) -> None:
    """Write `mean + temperature * exp(logvar / 2) * eps` into `z`, contiguous; the inputs of any strides."""
    inputs, outputs = (mean, logvar), (z,)
    _call(
        _library.amvl_sample_forward,
        z.shape,
        inputs,
        outputs,
        seed,
        sample_ids,
        stream=stream,
        temperature=temperature,
    )


def sample_gaussian_backward(
    grad_z: Tensor,
    logvar: Tensor,
    seed: Tensor,
    sample_ids: Tensor | None,
    temperature: float,
    stream: int,
    grad_logvar: Tensor,
) -> None:
    """Write `grad_z * temperature * exp(logvar / 2) * eps / 2` into `grad_logvar`, contiguous."""
    inputs, outputs = (grad_z, logvar), (grad_logvar,)
    _call(
        _library.amvl_sample_backward,
        grad_logvar.shape,
        inputs,
        outputs,
        seed,
        sample_ids,
        stream=stream,
        temperature=temperature,
    )


def gaussian_noise(out: Tensor, seed: Tensor, sample_ids: Tensor | None, stream: int) -> None:
    """Fill `out`, `[..., d]` float32 and contiguous, with the noise of one seed and stream."""
    _call(_library.amvl_noise, out.shape, (), (out,), seed, sample_ids, stream=stream)


def philox_words(out: Tensor, seed: Tensor, sample_ids: Tensor | None, stream: int) -> None:
    """Fill `out`, `[rows, columns]` int32 and contiguous, with the bits of the 32-bit words behind the noise.

    Columns 4 g to 4 g + 3 are the words of column group g.
    """
    _call(_library.amvl_words, out.shape, (), (out,), seed, sample_ids, stream=stream)

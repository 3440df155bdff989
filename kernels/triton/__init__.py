"""The Triton kernels of amvl_fast: launchers over plain tensors that know nothing of models or autograd.

They trust their caller for everything that `amvl_fast.ops` checks: one shape, one device, float32, bfloat16
or float16, contiguous sample ids. Under `TRITON_INTERPRET=1`, set before Triton is first imported, they run on CPU
tensors.
"""

import triton

from .gaussian_dual_kl import (
    gaussian_dual_kl_backward,
    gaussian_dual_kl_forward,
    gaussian_dual_kl_forward_kernel,
)
from .gaussian_noise import gaussian_noise
from .sample_gaussian import sample_gaussian_backward, sample_gaussian_forward

# Triton decides when a kernel is defined, so ask a kernel and not the environment of today.
INTERPRETED = not isinstance(gaussian_dual_kl_forward_kernel, triton.JITFunction)

__all__ = [
    "INTERPRETED",
    "gaussian_dual_kl_backward",
    "gaussian_dual_kl_forward",
    "gaussian_noise",
    "sample_gaussian_backward",
    "sample_gaussian_forward",
]

"""The latent ops, each with interchangeable backends that give the same values for the same seed."""

from amvl_fast.ops.backends import BACKENDS, backend_status, kernels_of
from amvl_fast.ops.gaussian_dual_kl import gaussian_dual_kl
from amvl_fast.ops.gaussian_noise import gaussian_noise
from amvl_fast.ops.sample_gaussian import sample_gaussian
from amvl_fast.reference.gaussian import DualKL

__all__ = [
    "BACKENDS",
    "DualKL",
    "backend_status",
    "gaussian_dual_kl",
    "gaussian_noise",
    "kernels_of",
    "sample_gaussian",
]

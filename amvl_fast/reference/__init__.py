"""The oracles: plain, slow, obviously right PyTorch that optimised code is tested against."""

from amvl_fast.reference.gaussian import gaussian_dual_kl
from amvl_fast.reference.three_pass import three_pass

__all__ = ["gaussian_dual_kl", "three_pass"]

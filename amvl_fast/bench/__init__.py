"""Measurements of the fused kernels, behind `amvl-fast bench`."""

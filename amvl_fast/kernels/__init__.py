"""Where the fused kernels are installed; their sources stand in `kernels/` at the root of the repository.

This file exists so that an editable install, which can only map whole packages, has a parent to hang them on.
"""

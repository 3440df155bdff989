"""GPUs that predictions are made for: the table of `amvl_fast.cost`."""

from amvl_fast.cost.gpus import GPU, GPUS

__all__ = ["GPU", "GPUS"]
